"""Groups over servers: spread, bounded, in order; failures move to another server; nothing is silently lost."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.records import CollectedGroup, IssuedGroup
from minpro_megatron.rollout.generation import MAX_GROUP_ATTEMPTS, GenerationError, GroupCollector
from minpro_megatron.rollout.prompts import PromptStream
from minpro_megatron.serving.client import (
    InvalidAnswer,
    RequestRefused,
    SampledSequence,
    SamplingParameters,
    ServerUnavailable,
    WrongPolicyVersion,
)
from tests.unit.rollout_fakes import RESPONSES, run_config, sequence, tokenized_prompts

SAMPLING = SamplingParameters(1.0, 4)


class FakeServer:
    """Generates after `steps` turns of the event loop; raises what `failures` holds first."""

    def __init__(self, name: str, steps: int = 1, failures: Sequence[Exception] = ()) -> None:
        self.name, self.steps, self.failures = name, steps, list(failures)
        self.groups: list[tuple[int, ...]] = []
        self.in_flight = self.most_in_flight = 0

    async def generate(
        self, prompt_token_ids: np.ndarray, seeds: Sequence[int], sampling: SamplingParameters, policy_version: int
    ) -> list[SampledSequence]:
        self.groups.append(tuple(seeds))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            for _ in range(self.steps):
                await asyncio.sleep(0)
            if self.failures:
                raise self.failures.pop(0)
            return [sequence(policy_version, seed) for seed in seeds]
        finally:
            self.in_flight -= 1


class FakeRewards:
    async def grade_all(self, texts: Sequence[str], answer: str) -> list[float]:
        return [float(len(text)) for text in texts]


class FakeTokenizer:
    def response_text(self, token_ids: np.ndarray) -> str:
        return "x" * len(token_ids)


def collect(
    servers: Sequence[FakeServer], groups: Sequence[IssuedGroup], max_groups_per_server: int = 100
) -> list[CollectedGroup]:
    async def main() -> list[CollectedGroup]:
        collector = GroupCollector(servers, FakeRewards(), FakeTokenizer(), max_groups_per_server)  # type: ignore[arg-type]
        return await asyncio.gather(*(collector.collect(group, SAMPLING) for group in groups))

    return asyncio.run(main())


@pytest.fixture
def groups(tmp_path: Path) -> list[IssuedGroup]:
    stream = PromptStream(tokenized_prompts(9), run_config(tmp_path))
    return [group for index in range(4) for group in stream.groups(index, 2)]


def unavailable(name: str) -> ServerUnavailable:
    return ServerUnavailable(name, "0" * 32, "connection", "refused")


def test_responses_keep_their_order_and_rewards(groups: list[IssuedGroup]) -> None:
    (group,) = collect([FakeServer("a")], groups[:1])
    assert group.issued is groups[0]
    expected = [sequence(2, seed).token_ids.tolist() for seed in groups[0].sampling_seeds]
    assert [response.token_ids.tolist() for response in group.responses] == expected
    assert [response.reward for response in group.responses] == [3.0] * RESPONSES
    assert group.oldest_version == 2


def test_groups_spread_over_the_servers_and_each_stays_on_one(groups: list[IssuedGroup]) -> None:
    servers = [FakeServer("a"), FakeServer("b"), FakeServer("c")]
    collect(servers, groups)
    assert [len(server.groups) for server in servers] == [4, 4, 4]
    asked = [seeds for server in servers for seeds in server.groups]
    assert sorted(asked) == sorted(tuple(group.sampling_seeds) for group in groups)


def test_concurrency_is_bounded_and_groups_start_in_order(groups: list[IssuedGroup]) -> None:
    server = FakeServer("a", steps=3)
    collect([server], groups, max_groups_per_server=2)
    assert server.most_in_flight == 2
    assert server.groups == [tuple(group.sampling_seeds) for group in groups]


@pytest.mark.parametrize("kind", [ServerUnavailable, InvalidAnswer])
def test_a_failed_group_moves_to_another_server(groups: list[IssuedGroup], kind: type) -> None:
    broken = FakeServer("a", failures=[kind("a", "0" * 32, "field", "broken")] * 99)
    sound = FakeServer("b")
    assert len(collect([broken, sound], groups)) == len(groups)
    assert len(sound.groups) == len(groups)


def test_a_single_server_gets_the_group_again(groups: list[IssuedGroup]) -> None:
    server = FakeServer("a", failures=[unavailable("a")] * (MAX_GROUP_ATTEMPTS - 1))
    assert len(collect([server], groups[:1])) == 1
    assert len(server.groups) == MAX_GROUP_ATTEMPTS


def test_a_lasting_failure_ends_with_the_group_and_its_cause(groups: list[IssuedGroup]) -> None:
    servers = [FakeServer(name, failures=[unavailable(name)] * 99) for name in ("a", "b")]
    with pytest.raises(GenerationError, match=r"group 0 \(prompt 'p\d'\): 3 attempts failed; the last one: [ab], "):
        collect(servers, groups[:1])


@pytest.mark.parametrize("kind", [RequestRefused, WrongPolicyVersion])
def test_what_repeating_cannot_mend_is_not_repeated(groups: list[IssuedGroup], kind: type[Exception]) -> None:
    servers = [FakeServer(name, failures=[kind(name, "0" * 32, "field", "no")]) for name in ("a", "b")]
    with pytest.raises(kind):
        collect(servers, groups[:1])
    assert len(servers[0].groups) + len(servers[1].groups) == 1
