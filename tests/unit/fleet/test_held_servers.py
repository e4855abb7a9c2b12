"""Groups of episodes on the servers of a fleet: one server for all turns, capacity while a tool runs, moves."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.fleet.episodes import EpisodeRules
from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.fleet.generation import GroupCollector
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import CollectedGroup, Prompt, ServerAddress
from minpro_megatron.rewards.graders import SampledText
from minpro_megatron.rewards.judging import Judged
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters
from minpro_megatron.serving.endpoints import remove_server_address, write_server_address
from minpro_megatron.serving.errors import ServerUnavailable
from tests.support.rollout_fakes import run_config
from tests.support.scripted_episodes import issued, rules, write_tokenizer

SAMPLING = SamplingParameters(1.0, 120)


class TurnClient:
    """A server's client that says "3", then "x"; a request fails while `fails`, and waits for `gate`."""

    def __init__(self, name: str, tokenizer: TextTokenizer, facts: ModelFacts) -> None:
        self.name, self._facts = name, facts
        self._says = [[*ids.tolist(), *facts.stop_token_ids] for ids in tokenizer.encode_all(["3", "x"])]
        self.version = 0
        self.fails = False
        self.slow_seeds: set[int] = set()  # the only ones that wait for the gate; empty: all do
        self.gate = asyncio.Event()
        self.gate.set()
        self.requests: list[tuple[int, str]] = []  # (seed, cache key)

    async def __aenter__(self) -> "TurnClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def policy_version(self, timeout_s: float) -> int:
        return self.version

    async def generates(self, timeout_s: float) -> bool:
        return True

    async def generate(
        self,
        prompt_token_ids: np.ndarray,
        seeds: Sequence[int],
        sampling: SamplingParameters,
        policy_version: int,
        before_continuing: Callable[[], Awaitable[object]],
    ) -> list[SampledSequence]:
        (seed,) = seeds
        self.requests.append((seed, sampling.cache_key))
        if self.fails:
            raise ServerUnavailable(self.name, "r", "connection", "refused")
        version = self.version
        if not self.slow_seeds or seed in self.slow_seeds:
            await self.gate.wait()
        ids = np.asarray(self._says[len(prompt_token_ids) > 3], np.int32)
        return [SampledSequence(ids, np.full(len(ids), -0.5, np.float32), np.full(len(ids), version, np.int32), "stop")]


class Tool:
    """Answers once `free` is set; an episode whose seed is `broken` gets an error."""

    def __init__(self) -> None:
        self.free = asyncio.Event()
        self.asked = 0
        self.broken = -1

    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        if turn.earlier:
            return None
        self.asked += 1
        await self.free.wait()
        if turn.seed == self.broken:
            raise OSError("no tool")
        return Answer("=4", tool_calls=1)


class Rewards:
    def __init__(self) -> None:
        self.texts: list[str] = []

    async def judge(
        self, prompt: Prompt, responses: Sequence[SampledText], stop_at_failure: bool = False
    ) -> list[Judged]:
        self.texts += [response.text for response in responses]
        return [Judged(1.0) for _ in responses]


class Rig:
    def __init__(self, folder: Path, count: int, mode: str = "delay", max_running_requests: int = 2) -> None:
        self.tokenizer, self.facts = write_tokenizer(folder)
        values = run_config(folder, max_staleness=2 if mode == "bounded" else 0).model_dump()
        values["server"] |= {
            "count": count, "max_running_requests": max_running_requests, "health_interval_s": 0.01,
        }  # fmt: skip
        self.config = type(run_config(folder)).model_validate(values)
        self.clients = [TurnClient(f"server {index}", self.tokenizer, self.facts) for index in range(count)]
        self.tool, self.rewards = Tool(), Rewards()
        self.rules: EpisodeRules = rules(self.tokenizer, self.facts, self.tool)  # type: ignore[arg-type]

    def run(self, use: Callable[[Fleet, GroupCollector], Awaitable[None]]) -> None:
        async def main() -> None:
            for index in range(len(self.clients)):
                write_server_address(
                    self.config.run_dir, ServerAddress(index=index, url="http://x", tensor_parallel=1), 0
                )

            def make_client(address: ServerAddress) -> TurnClient:
                return self.clients[address.index]

            async with asyncio.timeout(20), Fleet(self.config, self.facts, 0, make_client, 0.005) as fleet:
                await fleet.wait_until_ready(5)
                await use(fleet, GroupCollector(fleet, self.rewards, self.tokenizer, self.rules))  # type: ignore[arg-type]

        asyncio.run(main())


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def checked(group: CollectedGroup) -> CollectedGroup:
    for response in group.responses:
        assert response.loss_mask is not None
        assert [turn.tool_calls for turn in response.turns] == [1, 0]
    return group


def test_all_turns_of_a_group_go_to_the_server_that_has_its_first_ones(tmp_path: Path) -> None:
    rig = Rig(tmp_path, count=3, max_running_requests=8)
    rig.tool.free.set()

    async def use(fleet: Fleet, groups: GroupCollector) -> None:
        found = await asyncio.gather(*(groups.collect(issued([10 * n, 10 * n + 1]), SAMPLING) for n in range(6)))
        assert [response.reward for group in found for response in checked(group).responses] == [1.0] * 12

    rig.run(use)
    for client in rig.clients:
        groups = {seed // 10 for seed, _ in client.requests if seed < 100}
        assert len(groups) == 2
        assert len(client.requests) == 2 * 2 * 2
        assert len({key for _, key in client.requests}) == len(groups), "one cache key for each group and version"
    # what the policy wrote is graded, and not what the tool gave
    assert rig.rewards.texts == ["3\nx"] * 12


def test_a_server_takes_other_work_while_episodes_wait_for_their_tool(tmp_path: Path) -> None:
    """The server has room for one group. While the first group's tools run, the second one starts."""
    rig = Rig(tmp_path, count=1)

    async def use(fleet: Fleet, groups: GroupCollector) -> None:
        tasks = [asyncio.create_task(groups.collect(issued([10 * n, 10 * n + 1]), SAMPLING)) for n in range(3)]
        await until(lambda: rig.tool.asked == 6)
        assert fleet.metrics()["fleet/groups_in_flight"] == 3
        rig.tool.free.set()
        for task in tasks:
            checked(await task)
        assert fleet.metrics()["fleet/groups_in_flight"] == 0
        assert [member.num_requests for member in fleet._members.values()] == [0]

    rig.run(use)


def test_a_group_whose_server_is_withdrawn_between_two_turns_goes_on_at_another(tmp_path: Path) -> None:
    rig = Rig(tmp_path, count=2)

    async def use(fleet: Fleet, groups: GroupCollector) -> None:
        task = asyncio.create_task(groups.collect(issued([1, 2]), SAMPLING))
        await until(lambda: rig.tool.asked == 2)
        first = next(index for index, client in enumerate(rig.clients) if client.requests)
        remove_server_address(rig.config.run_dir, first, 0)
        await until(lambda: len(fleet.members()) == 1)
        rig.tool.free.set()
        checked(await task)
        assert fleet.metrics()["fleet/moved_groups"] == 1
        assert len(rig.clients[first].requests) == 2
        assert len(rig.clients[1 - first].requests) == 2

    rig.run(use)


def test_a_failing_server_counts_against_itself_and_the_complete_turns_stay(tmp_path: Path) -> None:
    rig = Rig(tmp_path, count=2)

    async def use(fleet: Fleet, groups: GroupCollector) -> None:
        task = asyncio.create_task(groups.collect(issued([1, 2]), SAMPLING))
        await until(lambda: rig.tool.asked == 2)
        first = next(client for client in rig.clients if client.requests)
        first.fails = True
        rig.tool.free.set()
        checked(await task)
        assert fleet.metrics()["fleet/failures/connection"] >= 1
        (other,) = (client for client in rig.clients if client is not first)
        assert len(other.requests) == 2

    rig.run(use)


def test_in_bounded_mode_a_turn_waits_while_weights_change_and_then_has_another_cache_key(tmp_path: Path) -> None:
    rig = Rig(tmp_path, count=1, mode="bounded")
    (client,) = rig.clients

    async def use(fleet: Fleet, groups: GroupCollector) -> None:
        task = asyncio.create_task(groups.collect(issued([1, 2]), SAMPLING))
        await until(lambda: rig.tool.asked == 2)
        fleet.lend(fleet.members())
        rig.tool.free.set()
        await asyncio.sleep(0.05)
        assert len(client.requests) == 2, "a turn was sent while the trainer may change the weights"
        client.version = 1
        fleet.set_version(1, [0])
        group = checked(await task)
        assert (group.oldest_version, group.newest_version) == (0, 1)
        assert len({key for _, key in client.requests}) == 2

    rig.run(use)


@pytest.mark.parametrize("is_evaluation", [False, True])
def test_a_group_whose_environment_failed_is_not_graded(tmp_path: Path, is_evaluation: bool) -> None:
    rig = Rig(tmp_path, count=1)
    rig.tool.free.set()
    rig.tool.broken = 1

    async def use(fleet: Fleet, groups: GroupCollector) -> None:
        group = msgspec.structs.replace(issued([1, 2]), is_evaluation=is_evaluation)
        found = await groups.collect(group, SAMPLING)
        assert found.grading_problem == "the environment raised OSError: no tool"
        assert [response.is_graded for response in found.responses] == [False, is_evaluation]

    rig.run(use)


def test_a_server_takes_other_work_when_some_episodes_of_a_group_are_over(tmp_path: Path) -> None:
    """The server has room for two groups, of each of which one episode is over and the other goes on."""
    rig = Rig(tmp_path, count=1, max_running_requests=3)
    (client,) = rig.clients
    rig.tool.free.set()

    async def use(fleet: Fleet, groups: GroupCollector) -> None:
        client.slow_seeds = {derive_seed(1, "turn", 1), derive_seed(11, "turn", 1)}
        client.gate.clear()
        tasks = [asyncio.create_task(groups.collect(issued([10 * n, 10 * n + 1]), SAMPLING)) for n in range(3)]
        await until(lambda: len(client.requests) == 3 * 2 * 2)
        assert [task.done() for task in tasks[:2]] == [False, False]
        client.gate.set()
        for task in tasks:
            checked(await task)
        assert [member.num_requests for member in fleet._members.values()] == [0]

    rig.run(use)
