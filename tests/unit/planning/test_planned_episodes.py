"""Episodes in the simulation of a run: worked out by hand, and against the fleet that runs them."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import episodes as measured
from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.environments.framing import Framing
from minpro_megatron.errors import UserError
from minpro_megatron.fleet.episodes import EpisodeRules
from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.fleet.generation import GroupCollector
from minpro_megatron.planning.simulated_server import Lengths, Server
from minpro_megatron.planning.simulator import Phases
from minpro_megatron.planning.workload import GroupLengths, Workload, response_quantiles
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters
from minpro_megatron.serving.endpoints import write_server_address
from tests.support.planned_runs import run_to_plan
from tests.support.simulated_steps import SlowedByContext, Steady, simulate

EPISODES = {
    "environment": {"name": "python_tool"},
    "sampling": {"max_prompt_tokens": 1024, "max_response_tokens": 8192, "max_turns": 4},
    "data": {"train_file": "unused", "heldout_file": "unused", "chat_template": True},
}


def batch_s(lengths: Lengths, groups: int = 1, server: Any = None) -> float:
    found = simulate({"delay_steps": 0}, server=server, lengths=lambda group: lengths, prompts=groups, steps=1)
    (seconds,) = found.batch_s
    return seconds


def test_an_episode_waits_for_its_answers_and_samples_the_rest() -> None:
    """20 tokens in two turns with an answer of 5 after 7 s; the other response has one turn."""
    assert batch_s(Lengths(0, [25, 10], [2, 1], answer_tokens=5, answer_s=7)) == pytest.approx(10 + 7 + 10)


def test_odd_tokens_go_to_the_first_turns() -> None:
    first = Lengths(3, [17, 1], [3, 1], answer_tokens=5).first_turns(0, sent=0.0)[0]
    second = first.next(5, sent=0.0)
    third = second.next(5, sent=0.0)
    assert [turn.length for turn in (first, second, third)] == [3, 2, 2]
    assert [turn.context for turn in (first, second, third)] == [3, 3 + 3 + 5, 3 + 3 + 5 + 2 + 5]
    assert [turn.prefill for turn in (first, second, third)] == [3, 5, 5]
    assert [turn.turns for turn in (first, second, third)] == [3, 2, 1]


def test_another_request_runs_while_an_episode_waits() -> None:
    """One at a time. The first response of 10 + 10 tokens waits 100 s, in which the three others run."""
    lengths = {0: Lengths(0, [20, 10], [2, 1], answer_s=100), 1: Lengths(0, [10, 10], [1, 1], answer_s=100)}
    found = simulate(
        {"delay_steps": 0}, server=Steady(max_running=1), lengths=lambda group: lengths[group % 2], prompts=2, steps=1
    )
    assert found.batch_s == [pytest.approx(10 + 100 + 10)]


def test_a_waiting_episode_uses_no_slot() -> None:
    """Two responses of two turns, 40 s of 60 s on two of eight slots; steps of 65.5 s."""
    found = simulate(
        {"delay_steps": 0},
        server=Steady(max_running=8),
        lengths=lambda group: Lengths(0, [40, 40], [2, 2], answer_s=20),
        prompts=1,
    )
    assert found.slot_share(2, 12) == pytest.approx(2 * 40 / (8 * 65.5))
    assert found.idle_share(2, 12) == pytest.approx(5.5 / 65.5)  # it holds the group all the time


def test_the_time_of_a_request_is_that_of_a_turn() -> None:
    found = simulate(
        {"delay_steps": 0}, lengths=lambda group: Lengths(0, [20, 5], [2, 1], answer_s=100), prompts=1, steps=1
    )
    assert sorted(found.request_s) == pytest.approx([5, 10, 10])


def test_only_the_answer_is_computed_before_a_later_turn() -> None:
    """A prompt of 50 tokens and an answer of 5 at 0.1 s for each."""
    lengths = Lengths(50, [25, 1], [2, 1], answer_tokens=5, answer_s=7)
    assert batch_s(lengths, server=Steady(prefill=0.1)) == pytest.approx(5 + 10 + 7 + 0.5 + 10)


@dataclass(frozen=True)
class Recording(Steady):
    prefills: list[float] = field(default_factory=list)

    def prefill_s(self, tokens: float) -> float:
        self.prefills.append(tokens)
        return 0.0


@pytest.mark.parametrize(("answer_s", "expected"), [(0.0, {3}), (40.0, {3, 12 + 3})])
def test_the_whole_context_is_computed_again_after_a_publication(answer_s: float, expected: set[int]) -> None:
    """In bounded mode weights are published while episodes wait for their answers of 3 tokens; a turn has 12."""
    server = Recording(max_running=8)
    simulate(
        {"mode": "bounded", "max_staleness": 3},
        phases=Phases(1.013, 4.017, 0.519, 0.519),  # no publication at the time at which a turn ends
        server=server,
        lengths=lambda group: Lengths(0, [27, 27], [2, 2], answer_tokens=3, answer_s=answer_s),
        publish={"pause_mode": "in_place"},  # what runs keeps its cache
    )
    assert set(server.prefills) == expected


def test_what_has_ended_leaves_the_cache_with_its_own_tokens() -> None:
    """A response of 100 tokens ends while another one that began later, after a prompt of 5, has 10."""
    server, numbers = Server(Steady(), 0), iter(range(10))
    server.take(0, Lengths(0, [100]))
    server.admit(numbers)  # type: ignore[arg-type]
    server.next_event()
    server.advance(90)
    server.take(1, Lengths(5, [20]))
    server.admit(numbers)  # type: ignore[arg-type]
    server.next_event()
    server.advance(100)
    assert [turn.group for turn in server.ended()] == [0]
    assert server.context == pytest.approx(5 + 10)


def test_responses_read_what_is_in_the_cache_and_no_more() -> None:
    """A token takes as many seconds as there are tokens in the cache at the start of its stretch."""
    lengths = Lengths(100, [1, 2 + 10 + 1], [1, 2], answer_tokens=10, answer_s=50)
    # both to one token; the second one's own 101 tokens once more; then prompt, two tokens and answer
    assert batch_s(lengths, server=SlowedByContext()) == pytest.approx(200 + 101 + 50 + 112)


# --- against the fleet ---

PROMPT, ANSWER, ANSWER_S = 200, 60, 2.0
NUM_GROUPS = 40
DRAW = random.Random(3)
SHAPES = [(DRAW.randint(20, 900), DRAW.randint(1, 4)) for _ in range(NUM_GROUPS * measured.GROUP_SIZE)]


class GivenTurns(measured.SimulatedServer):
    """Turns of the length of their episode, which the last token of a later turn's prompt names."""

    async def generate(
        self,
        prompt_token_ids: np.ndarray,
        seeds: Sequence[int],
        sampling: SamplingParameters,
        policy_version: int,
        before_continuing: Callable[[], Awaitable[object]],
    ) -> list[SampledSequence]:
        (seed,) = seeds
        episode = seed if len(prompt_token_ids) == PROMPT else int(prompt_token_ids[-1])
        length = SHAPES[episode][0]
        await asyncio.sleep(length / measured.TOKENS_PER_S)
        self.num_tokens += length
        ids = np.full(length, 5, np.int32)
        ids[-1] = measured.STOP
        return [SampledSequence(ids, np.full(length, -0.5, np.float32), np.zeros(length, np.int32), "stop")]


class GivenNumberOfTurns:
    async def answer(self, turn: EpisodeTurn) -> Answer | None:
        if len(turn.earlier) + 1 == SHAPES[turn.seed][1]:
            return None
        await asyncio.sleep(ANSWER_S)
        return Answer(token_ids=[7] * (ANSWER - 1) + [turn.seed])


async def fleet_s(root: Path, server: GivenTurns) -> float:
    """The simulated seconds of all groups through the run's own fleet and dispatcher."""
    config = measured.settings(root)
    config.run_dir.mkdir(parents=True)
    write_server_address(config.run_dir, ServerAddress(index=0, url="http://unused", tensor_parallel=1), 0)
    words: Any = measured.Words()
    rewards: Any = measured.NoRewards()
    framing = Framing.of(words, words, measured.FACTS.stop_token_ids, "tool", 100)
    rules = EpisodeRules(GivenNumberOfTurns(), framing, words, measured.FACTS.vocabulary_size, 5, None)
    async with Fleet(config, measured.FACTS, 0, lambda address: server, watch_interval_s=1.0) as fleet:
        await fleet.wait_until_ready(60)
        collector = GroupCollector(fleet, rewards, words, rules)
        began = asyncio.get_running_loop().time()
        sampling = SamplingParameters(1.0, measured.MAX_TOKENS)
        groups = [measured.group(number) for number in range(NUM_GROUPS)]
        await asyncio.gather(*(collector.collect(group, sampling) for group in groups))
        return asyncio.get_running_loop().time() - began


@dataclass(frozen=True)
class AsMeasured(Steady):
    def iteration_s(self, running: int, context_tokens: float) -> float:
        return 1 / measured.TOKENS_PER_S


def test_the_simulation_takes_as_long_as_the_fleet_with_the_same_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def inline[Result](function: Callable[..., Result], *arguments: Any) -> Result:
        return function(*arguments)  # real threads know nothing of simulated time

    monkeypatch.setattr(asyncio, "to_thread", inline)
    server = GivenTurns(takes_time=True)
    with asyncio.Runner(loop_factory=measured.SimulatedTime) as runner:
        seconds = runner.run(fleet_s(tmp_path, server))
    assert server.num_tokens == sum(length * turns for length, turns in SHAPES)

    def lengths(group: int) -> Lengths:
        shapes = SHAPES[group * measured.GROUP_SIZE : (group + 1) * measured.GROUP_SIZE]
        responses = [length * turns + (turns - 1) * ANSWER for length, turns in shapes]
        return Lengths(PROMPT, responses, [turns for _, turns in shapes], ANSWER, ANSWER_S)

    found = simulate(
        {"delay_steps": 0},
        server=AsMeasured(max_running=measured.IN_FLIGHT),
        lengths=lengths,
        prompts=NUM_GROUPS,
        steps=1,
        responses=measured.GROUP_SIZE,
        max_running_requests=measured.settings(tmp_path).server.max_running_requests,
    )
    assert found.batch_s[0] == pytest.approx(seconds, rel=0.005)


# --- what is assumed ---


def test_episodes_have_the_turns_and_answers_that_were_asked_for() -> None:
    config = run_to_plan(**EPISODES)
    workload = Workload.of(config, 3000, turns=2.5, answer_tokens=100, answer_s=3)
    lengths = GroupLengths(config, workload)
    groups = [lengths(group) for group in range(200)]
    assert all((group.answer_tokens, group.answer_s) == (100, 3) for group in groups)
    turns = [count for group in groups for count in group.turns]
    assert set(turns) <= {1, 2, 3}
    assert np.mean(turns) == pytest.approx(2.5, abs=0.1)
    for group in groups:
        for response, count in zip(group.responses, group.turns, strict=True):
            assert (count - 1) * 100 <= response / 2
    without = GroupLengths(config, Workload.of(run_to_plan(), 3000))
    assert [without(group).responses for group in range(200)] == [group.responses for group in groups]
    assert without(0).turns == ()


def test_by_default_the_turns_are_in_the_middle_of_what_is_allowed() -> None:
    config = run_to_plan(**EPISODES)
    episodes = Workload.of(config).episodes
    assert episodes is not None
    assert episodes.mean_turns == pytest.approx(2.5, rel=0.01)
    assert episodes.answer_tokens == 100
    assert Workload.of(run_to_plan()).episodes is None
    assert max(response_quantiles(Workload.of(config), 8192)) <= 8192  # the limit counts given tokens


@pytest.mark.parametrize(
    ("limit", "given"),
    [(24, {}), (24, {"answer_tokens": 12}), (300, {"answer_tokens": 100}), (8192, {"turns": 3.9}), (1, {})],
    ids=str,
)
def test_the_mean_of_turns_is_that_of_the_simulated_responses(limit: int, given: dict[str, Any]) -> None:
    config = run_to_plan(**EPISODES | {"sampling": {"max_response_tokens": limit, "max_turns": 4}})
    workload = Workload.of(config, **given)
    assert workload.episodes is not None
    lengths = GroupLengths(config, workload)
    turns = [count for group in range(2000) for count in lengths(group).turns]
    assert workload.episodes.mean_turns == pytest.approx(np.mean(turns), rel=0.02)


def test_the_default_answer_leaves_room_for_the_policy() -> None:
    config = run_to_plan(**EPISODES | {"sampling": {"max_response_tokens": 24, "max_turns": 2}})
    episodes = Workload.of(config).episodes
    assert episodes is not None
    assert episodes.answer_tokens == 4  # half of a response of 9.6 tokens
    assert 1.2 < episodes.mean_turns < 1.5


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        (EPISODES, {"turns": 4.5}, "mean turns = 4.5 must be at least 1 and at most sampling.max_turns = 4"),
        (EPISODES, {"turns": 0.5}, "mean turns = 0.5 must be at least 1"),
        (
            EPISODES,
            {"turns": 4.0, "answer_tokens": 100, "response_tokens": 300.0},
            "mean turns = 4 cannot be kept: with answers of 100 tokens .* of 300 on average.* the mean is [12]",
        ),
        (EPISODES, {"answer_tokens": 8192}, "answer tokens = 8192 must be below sampling.max_response_tokens = 8192"),
        ({}, {"turns": 2.0}, "mean turns = 2: .* environment.name = none"),
        ({}, {"answer_tokens": 50}, "answer tokens = 50: .* environment.name = none"),
        ({}, {"answer_s": 1.5}, "answer seconds = 1.5: .* environment.name = none"),
    ],
)
def test_episodes_that_a_run_cannot_have_are_refused(
    settings: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Workload.of(run_to_plan(**settings), **given)
