"""Rollout servers that compute nothing: they answer like SGLang 0.5.23, with bodies prepared in advance.

Lengths are long-tailed: log-normal with the median at a quarter of the limit and sigma 0.8, cut at the limit, which
4 % of the responses reach. `POST /weight_version/{version}` replaces a publication.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import NormalDist

import msgspec
import numpy as np
from aiohttp import web

from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.endpoints import read_server_addresses, write_server_address

VOCABULARY_SIZE = 151936  # Qwen3's
STOP_TOKEN = 151643
NUM_LENGTHS = 64  # prepared responses; a response's seed chooses one
SIGMA = 0.8
MEAN_LOG_PROB = -0.4


class _Sampling(msgspec.Struct):
    sampling_seed: int
    max_new_tokens: int


class _Request(msgspec.Struct):
    rid: list[str]
    input_ids: list[list[int]]
    sampling_params: list[_Sampling]


def response_lengths(max_tokens: int) -> list[int]:
    """The lengths of the prepared responses, ascending: equally likely quantiles of the distribution."""
    normal = NormalDist()
    quantiles = [(place + 0.5) / NUM_LENGTHS for place in range(NUM_LENGTHS)]
    lengths = [int(max_tokens / 4 * np.exp(SIGMA * normal.inv_cdf(quantile))) for quantile in quantiles]
    return [min(max(length, 1), max_tokens) for length in lengths]


def prepare(length: int, max_tokens: int) -> tuple[bytes, bytes, bytes]:
    """The parts of an answer that only depend on its length: token ids, end of generation, log-probs."""
    random = np.random.default_rng(length)
    tokens = random.integers(0, STOP_TOKEN, length)
    reason: dict[str, object] = {"type": "length", "length": length}
    if length < max_tokens:
        tokens[-1] = STOP_TOKEN
        reason = {"type": "stop", "matched": STOP_TOKEN}
    # float32 in float64's digits, as SGLang writes them
    log_probs = (MEAN_LOG_PROB * random.exponential(size=length)).astype(np.float32).astype(float).tolist()
    ids = tokens.tolist()
    entries = [(log_prob, token, None) for log_prob, token in zip(log_probs, ids, strict=True)]
    return msgspec.json.encode(ids), msgspec.json.encode(reason), msgspec.json.encode(entries)


class SyntheticServer:
    """One server; `application` is to be served. `prepared` holds the parts of an answer of each length."""

    def __init__(self, lengths: Sequence[int], prepared: Sequence[tuple[bytes, bytes, bytes]]) -> None:
        self._version = "0"
        self._lengths = lengths
        self._prepared = prepared
        self.application = web.Application(client_max_size=2**30)
        self.application.router.add_post("/generate", self._generate)
        self.application.router.add_get("/model_info", self._model_info)
        self.application.router.add_post("/abort_request", self._abort)
        self.application.router.add_post("/weight_version/{version}", self._set_version)

    async def _generate(self, request: web.Request) -> web.Response:
        asked = msgspec.json.decode(await request.read(), type=_Request)
        parts = []
        for request_id, prompt, sampling in zip(asked.rid, asked.input_ids, asked.sampling_params, strict=True):
            parts += [b"," if parts else b"[", *self._answer(request_id, len(prompt), sampling.sampling_seed)]
        return web.Response(body=b"".join([*parts, b"]"]), content_type="application/json")

    def _answer(self, request_id: str, num_prompt_tokens: int, seed: int) -> Iterator[bytes]:
        place = seed % NUM_LENGTHS
        length, version = self._lengths[place], self._version
        ids, reason, log_probs = self._prepared[place]
        yield b'{"output_ids":'
        yield ids
        yield f',"meta_info":{{"id":"{request_id}","finish_reason":'.encode()
        yield reason
        yield (
            f',"prompt_tokens":{num_prompt_tokens},"weight_version":"{version}","num_retractions":0,'
            '"input_token_logprobs":[],"output_token_logprobs":'
        ).encode()
        yield log_probs
        yield (
            f',"output_token_logprobs_length":{length},"reasoning_tokens":0,"completion_tokens":{length},'
            f'"cached_tokens":0,"weight_versions":[{{"version":"{version}","start":0,"end":{length}}}],'
            '"cached_tokens_details":null,"dp_rank":null,"e2e_latency":0.45}}'
        ).encode()

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self._version})

    async def _abort(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _set_version(self, request: web.Request) -> web.Response:
        self._version = request.match_info["version"]
        return web.Response()


async def _serve(run_dir: Path, indices: Sequence[int], max_tokens: int) -> None:
    lengths = response_lengths(max_tokens)
    prepared = [prepare(length, max_tokens) for length in lengths]
    for index in indices:
        runner = web.AppRunner(SyntheticServer(lengths, prepared).application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        run_dir.mkdir(parents=True, exist_ok=True)
        write_server_address(run_dir, ServerAddress(index=index, url=url, tensor_parallel=1), incarnation=0)
    await asyncio.Event().wait()


def _run(run_dir: Path, indices: Sequence[int], max_tokens: int) -> None:
    asyncio.run(_serve(run_dir, indices, max_tokens))


@contextmanager
def synthetic_servers(
    run_dir: Path, count: int, num_processes: int, max_tokens: int, timeout_s: float = 120.0
) -> Iterator[list[ServerAddress]]:
    """`count` servers in `num_processes` processes, with their addresses in the run folder."""
    context = multiprocessing.get_context("spawn")
    shares = [range(first, count, num_processes) for first in range(min(num_processes, count))]
    processes = [context.Process(target=_run, args=(run_dir, list(share), max_tokens)) for share in shares]
    for process in processes:
        process.start()
    try:
        deadline = time.monotonic() + timeout_s
        while len(addresses := read_server_addresses(run_dir, count, incarnation=0)) < count:
            if time.monotonic() > deadline or not all(process.is_alive() for process in processes):
                raise RuntimeError(f"{len(addresses)} of {count} synthetic servers after {timeout_s:g} s")
            time.sleep(0.1)
        yield addresses
    finally:
        for process in processes:
            process.terminate()
            process.join()
