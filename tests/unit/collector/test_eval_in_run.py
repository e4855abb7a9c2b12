"""Benchmarks inside a run: at the versions that are evaluated, each once, without a trace in the staleness."""

import asyncio
import json
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.collector.collector import Collector
from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.evaluation.in_run import EvaluationSet, load_benchmarks
from minpro_megatron.evaluation.sampling import EvaluationNotGraded, evaluate, evaluation_groups
from minpro_megatron.fleet.generation import GenerationError
from minpro_megatron.monitor.alarm_log import AlarmLog, read_alarms
from minpro_megatron.monitor.step_report import StepReport
from minpro_megatron.monitor.writer import RunWriter
from minpro_megatron.prompts.prompts import PromptStream
from minpro_megatron.records import Batch, CollectedGroup, CollectorTotals, EvaluationResult, IssuedGroup
from minpro_megatron.serving.client import SamplingParameters
from tests.support.collector_rig import FakeTrainer
from tests.support.rollout_fakes import (
    FakeServers,
    collected,
    issued_groups,
    run_config,
    tokenized_prompts,
    write_rows,
)

SETS = [EvaluationSet("aime24", tokenized_prompts(3), 4), EvaluationSet("gsm8k", tokenized_prompts(1), 1)]
NAMES = ["", "aime24", "gsm8k"]


@asynccontextmanager
async def collecting(
    config: RunConfig, servers: FakeServers, version: int = 0
) -> AsyncIterator[tuple[Collector, Journal]]:
    """A collector with benchmarks that goes on from the checkpoint of `version`; killed at the end."""
    journal = await Journal.open(config.run_dir)
    stream = PromptStream(tokenized_prompts(7), config)
    collector = Collector(config, journal, stream, tokenized_prompts(2), servers.collect, servers, SETS)
    await collector.restore(version)
    running = asyncio.create_task(collector.run())
    try:
        yield collector, journal
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await journal.close()


async def whole_run(config: RunConfig, servers: FakeServers) -> CollectorTotals:
    async with collecting(config, servers) as (collector, _):
        return await FakeTrainer(config).run(collector)


def evaluated(totals: CollectorTotals) -> list[tuple[int, str]]:
    return [(result.policy_version, result.benchmark) for result in totals.evaluations]


@pytest.mark.parametrize("bound", [0, 2])
def test_benchmarks_are_evaluated_with_the_held_out_prompts(tmp_path: Path, bound: int) -> None:
    config = run_config(tmp_path, steps=4, delay=1, evaluate_every=2, max_staleness=bound)
    totals = asyncio.run(whole_run(config, FakeServers(exact=not bound)))
    assert evaluated(totals) == [(version, name) for version in (0, 2, 4) for name in NAMES]
    sizes = {(result.benchmark, result.num_prompts, result.samples_per_prompt) for result in totals.evaluations}
    assert sizes == {("", 2, 2), ("aime24", 3, 4), ("gsm8k", 1, 1)}
    # accounting knows training groups only
    assert totals.groups_consumed == 4 * config.batch.num_prompts
    assert totals.largest_staleness <= max(bound, 1)
    lines = (config.run_dir / "evaluations.jsonl").read_bytes().splitlines()
    found = [msgspec.json.decode(line, type=EvaluationResult) for line in lines]
    assert sorted(found, key=lambda result: (result.policy_version, result.benchmark)) == totals.evaluations


def test_each_set_has_seeds_of_its_own(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=2, delay=1), FakeServers()
    asyncio.run(whole_run(config, servers))
    seeds = [seed for group in servers.issued if group.batch_index == -1 for seed in group.sampling_seeds]
    assert len(set(seeds)) == len(seeds) == 2 * (2 * 2 + 3 * 4 + 1 * 1)  # versions 0 and 2


def test_samples_are_requested_in_groups_of_the_training_size_and_joined_by_prompt(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=2, delay=1), FakeServers()
    totals = asyncio.run(whole_run(config, servers))
    groups = [group for group in servers.issued if group.is_evaluation and group.policy_version == 0]
    sizes = sorted((group.prompt.id, len(group.sampling_seeds)) for group in groups)
    # the held-out prompts p0 and p1, aime24's p0 to p2 with twice as many samples, gsm8k's p0
    assert sizes == sorted([("p0", 2), ("p1", 2), *[(f"p{i}", 2) for i in range(3) for _ in range(2)], ("p0", 1)])
    for name, prompts, samples in (("", 2, 2), ("aime24", 3, 4)):
        purpose = f"evaluation/{name}" if name else "evaluation"
        seeds = np.array(
            [[derive_seed(config.seed, purpose, 0, p, sample) for sample in range(samples)] for p in range(prompts)]
        )
        shares = (seeds % 2).mean(axis=1)  # FakeServers: the reward of a response
        (found,) = [result for result in totals.evaluations if (result.policy_version, result.benchmark) == (0, name)]
        assert (found.num_prompts, found.samples_per_prompt) == (prompts, samples)
        assert found.pass_at_1 == pytest.approx(shares.mean())
        assert found.mean_response_tokens == pytest.approx((1 + seeds % 4).mean())


class FailingBenchmark(FakeServers):
    """No server manages a prompt of aime24 at the given versions."""

    def __init__(self, versions: Sequence[int]) -> None:
        super().__init__()
        self._versions = versions

    async def collect(self, issued: IssuedGroup, sampling: SamplingParameters):
        if issued.is_evaluation and issued.prompt.id == "p2" and issued.policy_version in self._versions:
            raise GenerationError("group 2 (prompt 'p2'): 3 attempts failed")
        return await super().collect(issued, sampling)


def test_a_failed_evaluation_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, servers = run_config(tmp_path, steps=4, delay=1, evaluate_every=2), FailingBenchmark([2, 4])
    trainer = FakeTrainer(config)

    async def main() -> CollectorTotals:
        async with collecting(config, servers) as (collector, _):
            return await trainer.run(collector)

    totals = asyncio.run(main())
    every = [(version, name) for version in (0, 2, 4) for name in NAMES]
    assert evaluated(totals) == [key for key in every if key not in [(2, "aime24"), (4, "aime24")]]
    assert [lease.metrics["fleet/failed_evaluations"] for lease in trainer.leases] == [0, 0, 1, 1]
    assert totals.failed_evaluations == 2
    assert (
        "version 2: the evaluation on aime24 failed, the run continues without it: group 2 (prompt 'p2')" in caplog.text
    )


def test_a_failed_evaluation_raises_an_alarm(tmp_path: Path) -> None:
    """At the step whose metrics count it; after the last step there is none, but an alarm all the same."""
    config = run_config(tmp_path)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    totals = CollectorTotals(
        groups_issued=0, groups_consumed=0, groups_dropped=0, smallest_staleness=0, largest_staleness=0,
        groups_not_graded=0, versions_published=0, evaluations=[RESULT], failed_evaluations=3,
    )  # fmt: skip
    batch = Batch(index=0, groups=[collected(group) for group in issued_groups([0])])
    with RunWriter(config.run_dir) as writer:
        report = StepReport(writer, str, alarms=AlarmLog(config, 0))
        scalars = {"time/step_s": 1.0, "time/wait_for_batch_s": 0.0}
        raised = [report.step(step, scalars | {"fleet/failed_evaluations": count}, {}, batch) for step, count in
                  enumerate([0.0, 2.0, 2.0])]  # fmt: skip
        report.finished(totals)
        report.finished(msgspec.structs.replace(totals, failed_evaluations=2))
    assert [[alarm.name for alarm in of_step] for of_step in raised] == [[], ["failed_evaluation"], []]
    found = read_alarms(config.run_dir)
    assert [(alarm.step, alarm.name, alarm.seen.partition(" failed")[0]) for alarm in found] == [
        (1, "failed_evaluation", "2 evaluations"),
        (2, "failed_evaluation", "1 evaluation"),
    ]
    assert '"eval/pass_at_1": 0.5' in (config.run_dir / "metrics.jsonl").read_text()


def evaluated_rewards(rewards: list[list[float]], right_reward: float = 1.0) -> EvaluationResult:
    """The evaluation of prompts whose samples have these rewards."""
    prompts = [(tokenized.prompt, tokenized.token_ids) for tokenized in tokenized_prompts(len(rewards))]
    groups = evaluation_groups(prompts, len(rewards[0]), 0, 3, max_group_size=8)
    assert all(group.is_evaluation for group in groups)

    async def collect(issued: IssuedGroup) -> CollectedGroup:
        responses = [
            msgspec.structs.replace(response, reward=reward)
            for response, reward in zip(collected(issued).responses, rewards[issued.group_id], strict=True)
        ]
        return CollectedGroup(issued=issued, responses=responses, grading_problem="grader died with exit status 9")

    return asyncio.run(evaluate(groups, collect, "aime24", right_reward))


def test_accuracy_and_mean_reward_of_any_rewards() -> None:
    found = evaluated_rewards([[-1.0, 1.0], [1.0, 1.0], [-1.0, -1.0]])
    assert (found.pass_at_1, found.mean_reward, found.not_graded) == (0.5, 0.0, 0)
    graded_to_ten = [[7.0, 10.0], [2.0, 9.0]]
    assert evaluated_rewards(graded_to_ten).pass_at_1 == 1.0
    found = evaluated_rewards(graded_to_ten, right_reward=9.0)
    assert (found.pass_at_1, found.mean_reward) == (0.5, 7.0)


def test_what_could_not_be_graded_is_counted_and_worth_no_more_than_a_wrong_answer() -> None:
    wrong = evaluated_rewards([[-1.0, 1.0], [1.0, -1.0]])
    missing = evaluated_rewards([[math.nan, 1.0], [1.0, -1.0]])
    assert (missing.pass_at_1, missing.mean_reward) == (wrong.pass_at_1, wrong.mean_reward)
    assert (wrong.not_graded, missing.not_graded) == (0, 1)
    only_right = evaluated_rewards([[math.nan, 1.0], [1.0, math.nan]])  # nothing says what a wrong one is worth
    assert (only_right.pass_at_1, only_right.mean_reward) == (0.5, 0.5)
    reason = "version 3, benchmark aime24: none of the 4 responses could be graded: grader died with exit status 9"
    with pytest.raises(EvaluationNotGraded, match=reason):
        evaluated_rewards([[math.nan] * 2] * 2)


class SlowBenchmark(FakeServers):
    """The benchmark of one prompt and one sample ends only when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = asyncio.Event()

    async def collect(self, issued: IssuedGroup, sampling: SamplingParameters):
        if len(issued.sampling_seeds) == 1:
            await self.let_go.wait()
        return await super().collect(issued, sampling)


def test_weights_wait_for_the_slowest_benchmark(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=2, delay=1)

    async def main() -> list[int]:
        servers = SlowBenchmark()
        running = asyncio.create_task(whole_run(config, servers))
        seen = []
        for _ in range(40):
            await asyncio.sleep(0.002)
            seen.append(servers.version)
        servers.let_go.set()
        totals = await running
        assert evaluated(totals) == [(version, name) for version in (0, 2) for name in NAMES]
        return seen

    assert set(asyncio.run(main())) == {0}


def test_after_a_crash_only_what_is_missing_is_evaluated_again(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=2, delay=1)

    async def main() -> None:
        async with asyncio.timeout(5), collecting(config, SlowBenchmark()) as (_, journal):
            while len(await journal.evaluations()) < 2:  # the held-out prompts' and aime24's
                await asyncio.sleep(0.001)
        again = FakeServers()
        totals = await whole_run(config, again)
        assert evaluated(totals) == [(version, name) for version in (0, 2) for name in NAMES]
        repeated = [group for group in again.issued if group.batch_index == -1 and group.policy_version == 0]
        assert [len(group.sampling_seeds) for group in repeated] == [1]

    asyncio.run(main())


RESULT = EvaluationResult(
    policy_version=3, pass_at_1=0.5, standard_error=0.25,
    mean_reward=0.5, not_graded=1, num_prompts=4, samples_per_prompt=2,
    mean_response_tokens=10.0, wall_time_s=1.0,
)  # fmt: skip


def test_each_result_is_written_once_under_its_name(tmp_path: Path) -> None:
    earlier = msgspec.structs.replace(RESULT, policy_version=2, benchmark="aime24")
    benchmark = msgspec.structs.replace(RESULT, benchmark="aime24", pass_at_1=0.75)
    with RunWriter(tmp_path) as writer:
        report = StepReport(writer, str, first_step=3)
        report.evaluations([earlier, RESULT])
        report.evaluations([earlier, RESULT, benchmark])
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["metrics"]) for entry in entries] == [
        (
            3,
            {
                "eval/pass_at_1": 0.5,
                "eval/standard_error": 0.25,
                "eval/mean_reward": 0.5,
                "eval/not_graded": 1.0,
                "eval/response_length_mean": 10.0,
            },
        ),
        (
            3,
            {
                "evaluation/accuracy/aime24": 0.75,
                "evaluation/standard_error/aime24": 0.25,
                "evaluation/mean_reward/aime24": 0.5,
                "evaluation/not_graded/aime24": 1.0,
                "evaluation/response_length_mean/aime24": 10.0,
            },
        ),
    ]


def with_benchmarks(folder: Path, *benchmarks: dict) -> RunConfig:
    values = run_config(folder).model_dump()
    values["evaluation"]["benchmarks"] = list(benchmarks)
    return parse_run_config(values)


def test_benchmark_files_are_read_as_far_as_wanted(tmp_path: Path) -> None:
    rows = [{"id": f"p{i}", "source": "s", "prompt": f"{i}?", "answer": "1"} for i in range(3)]
    path = str(write_rows(tmp_path / "b.jsonl", rows))
    config = with_benchmarks(tmp_path, {"name": "a", "file": path, "num_prompts": 2}, {"name": "b", "file": path})
    assert [[prompt.id for prompt in prompts] for prompts in load_benchmarks(config)] == [
        ["p0", "p1"],
        ["p0", "p1", "p2"],
    ]
    with pytest.raises(ValueError, match=r"benchmarks\[0\].num_prompts = 4: .*b.jsonl has only 3 rows; lower it"):
        load_benchmarks(with_benchmarks(tmp_path, {"name": "a", "file": path, "num_prompts": 4}))
    with pytest.raises(ValueError, match=r"evaluation.benchmarks\[0\].file = 'none.jsonl': No such file"):
        load_benchmarks(with_benchmarks(tmp_path, {"name": "a", "file": "none.jsonl"}))


def test_two_benchmarks_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation: benchmarks: the names \['a', 'a'\] must differ"):
        with_benchmarks(tmp_path, {"name": "a", "file": "x"}, {"name": "a", "file": "y"})
