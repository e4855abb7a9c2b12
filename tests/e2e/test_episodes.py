"""Episodes on a real SGLang server: its prefix cache, its log-probs and its routes over several turns."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.config.run import RunConfig
from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.environments.framing import Framing
from minpro_megatron.fleet.episodes import EpisodeRules
from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.fleet.generation import GroupCollector
from minpro_megatron.models.model_files import ModelFacts, read_model_facts
from minpro_megatron.records import CollectedGroup, IssuedGroup, Prompt
from minpro_megatron.serving.client import SamplingParameters, ServerClient
from minpro_megatron.serving.endpoints import write_server_address
from minpro_megatron.serving.server_process import ServerProcess, stop_servers
from tests.e2e.random_models import log_probs_by_transformers, routes_by_transformers, save_random_model
from tests.support.running_fleet import FakeRewards

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine's stand-ins are not for GPU machines"),
]

PROMPT = [20, 21, 22, 23, 24, 25, 26, 27]
STOPS = tuple(range(1, 17))  # a quarter of the vocabulary: turns of a few tokens
BEFORE, AFTER, ANSWER = [STOPS[0], 40, 41], [42], [50, 51, 52, 53]
SEEDS, MAX_TURNS, MAX_TOKENS = list(range(8)), 4, 80


class Words:
    def encode_given(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ANSWER, np.int32) for _ in texts]

    def response_texts(self, responses: Sequence[np.ndarray]) -> list[str]:
        return ["x" * len(ids) for ids in responses]


class Always:
    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        return Answer("more", tool_calls=1)


@dataclass
class Server:
    """A running server, and what it said of each answer: (tokens sent, tokens of them that were cached)."""

    config: RunConfig
    process: ServerProcess
    folder: Path
    facts: ModelFacts
    answered: list[tuple[int, int]] = field(default_factory=list)

    def collect(self, group: IssuedGroup) -> CollectedGroup:
        words: Any = Words()
        rewards: Any = FakeRewards()
        framing = Framing(np.asarray(BEFORE[1:], np.int32), np.asarray(AFTER, np.int32), words, 32)
        rules = EpisodeRules(Always(), framing, words, self.facts.vocabulary_size, MAX_TURNS, 30.0)
        sampling = SamplingParameters(1.0, MAX_TOKENS, with_routes=True)
        server = self

        class Client(ServerClient):
            async def _body(self, *arguments: Any) -> bytes:
                body = await super()._body(*arguments)
                metas = [one["meta_info"] for one in json.loads(body)]
                server.answered += [(meta["prompt_tokens"], meta["cached_tokens"]) for meta in metas]
                return body

        def make(address: Any) -> Client:
            return Client(address, self.facts, 120)

        async def main() -> CollectedGroup:
            write_server_address(self.config.run_dir, self.process.address, 0)
            async with Fleet(self.config, self.facts, 0, make) as fleet:
                await fleet.wait_until_ready(60)
                return await GroupCollector(fleet, rewards, words, rules).collect(group, sampling)

        return asyncio.run(main())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("episodes")
    folder = root / "hf"
    save_random_model(folder, seed=0)
    config = RunConfig.model_validate(
        {
            "name": "episodes",
            "runs_dir": str(root / "runs"),
            "device": "cpu",
            "model": {
                "hf_path": str(folder), "megatron_path": "unused", "dtype": "float32", "routing_replay": "rollout",
            },
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "batch": {"num_prompts": 8, "mini_batch_prompts": 8, "responses_per_prompt": len(SEEDS)},
            "sampling": {"max_prompt_tokens": len(PROMPT), "max_response_tokens": MAX_TOKENS},
            "server": {
                "engine": "sglang", "device": "cpu", "dtype": "float32", "max_total_tokens": 4096,
                "start_timeout_s": 400,
            },
        }
    )  # fmt: skip
    process = ServerProcess(config, 0)
    process.start()
    try:
        assert process.wait_until_ready(config.server.start_timeout_s)
        facts = replace(read_model_facts(str(folder)), stop_token_ids=STOPS)
        yield Server(config, process, folder, facts)
    finally:
        stop_servers([process])


def test_turns_continue_in_the_servers_prefix_cache_with_its_log_probs_and_routes(server: Server) -> None:
    group = IssuedGroup(
        group_id=0,
        batch_index=0,
        policy_version=0,
        prompt=Prompt(id="p", source="s", text="", answer=""),
        prompt_token_ids=np.asarray(PROMPT, np.int32),
        sampling_seeds=SEEDS,
    )
    collected = server.collect(group)
    given_span = [*BEFORE[1:], *ANSWER, *AFTER]
    num_turns = [len(response.turns) for response in collected.responses]
    assert max(num_turns) == MAX_TURNS
    for response in collected.responses:
        ids, mask = response.token_ids, response.loss_mask
        if mask is None:
            assert len(response.turns) == 1
            continue
        sampled = mask > 0
        spans = np.split(ids, np.flatnonzero(np.diff(mask)) + 1)
        assert all(span.tolist() == given_span for span in spans[1::2])
        assert [turn.sampled_tokens for turn in response.turns] == [len(span) for span in spans[::2]]
        expected = log_probs_by_transformers(server.folder, PROMPT, ids, 1.0)
        assert np.abs(expected - response.rollout_log_probs)[sampled].max() < 1e-4
        assert np.isnan(response.rollout_log_probs[~sampled]).all()
        routes = response.routed_experts
        assert routes is not None
        of_transformers = routes_by_transformers(server.folder, [*PROMPT, *ids.tolist()])
        np.testing.assert_array_equal(np.sort(routes, axis=-1), of_transformers[:-1])
    # A later turn finds in the cache what its episode has sent and sampled before, perhaps without the last sampled
    # token, which need not have been computed: only the answer is new.
    later = [(sent, cached) for sent, cached in server.answered if sent > len(PROMPT)]
    assert len(later) == sum(num_turns) - len(SEEDS)
    assert {sent - cached for sent, cached in later} <= {len(given_span), len(given_span) + 1}
