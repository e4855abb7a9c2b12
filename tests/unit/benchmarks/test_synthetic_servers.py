"""The load benchmark's servers: their answers pass every check, and their lengths have a long tail."""

import asyncio

import numpy as np
from aiohttp.test_utils import TestServer

from benchmarks.synthetic_servers import STOP_TOKEN, VOCABULARY_SIZE, SyntheticServer, prepare, response_lengths
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters, ServerClient

MAX_TOKENS = 256
FACTS = ModelFacts(VOCABULARY_SIZE, (STOP_TOKEN,), max_position_embeddings=512)


def sampled(seeds: list[int], version: int) -> list[SampledSequence]:
    async def main() -> list[SampledSequence]:
        lengths = response_lengths(MAX_TOKENS)
        server = SyntheticServer(lengths, [prepare(length, MAX_TOKENS) for length in lengths])
        async with TestServer(server.application) as served:
            address = ServerAddress(index=0, url=str(served.make_url("")).rstrip("/"), tensor_parallel=1)
            async with ServerClient(address, FACTS, 5.0) as client:
                assert client._session is not None
                async with client._session.post(f"{address.url}/weight_version/{version}"):
                    pass
                assert await client.policy_version() == version
                return await client.generate([1, 2, 3], seeds, SamplingParameters(1.0, MAX_TOKENS), version)

    return asyncio.run(main())


def test_their_answers_pass_the_client_s_checks() -> None:
    short, long = sampled([0, 63 + 64 * 5], version=7)
    lengths = response_lengths(MAX_TOKENS)
    assert (len(short.token_ids), len(long.token_ids)) == (lengths[0], MAX_TOKENS)
    assert (short.finish_reason, long.finish_reason) == ("stop", "length")
    assert set(long.policy_versions.tolist()) == {7}


def test_lengths_have_a_long_tail_up_to_the_limit() -> None:
    lengths = response_lengths(20480)
    assert max(lengths) == 20480
    assert np.median(lengths) < np.mean(lengths) < 7000
    assert 0 < lengths.count(20480) <= 3
