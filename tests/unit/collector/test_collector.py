"""The collector with a real journal: both modes over whole runs, evaluations, filters, failures, scores."""

import asyncio
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest

from minpro_megatron.buffer.schedule import ScheduleError
from minpro_megatron.buffer.scores import check_scores, check_trained
from minpro_megatron.collector.changes import CollectorFailed
from minpro_megatron.collector.grading_watch import MAX_GROUPS_IN_A_ROW, GradingError, GradingWatch
from minpro_megatron.config.run import RunConfig
from minpro_megatron.prompts.prompts import TokenizedPrompt
from minpro_megatron.records import (
    Batch,
    BehaviorLogProbs,
    CollectedGroup,
    CollectorTotals,
    EvaluationResult,
    IssuedGroup,
    TrainedStep,
)
from tests.support import collector_rig
from tests.support.collector_rig import FakeTrainer, HeldServers, collecting
from tests.support.rollout_fakes import (
    NUM_PROMPTS,
    FailingGrades,
    FakeServers,
    collected,
    issued_groups,
    run_config,
    scores_of,
    tokenized_prompts,
)


def run_whole(config: RunConfig, servers: FakeServers) -> tuple[FakeTrainer, CollectorTotals]:
    trainer = FakeTrainer(config)

    async def main() -> CollectorTotals:
        async with collecting(config, servers) as collector:
            return await trainer.run(collector)

    return trainer, asyncio.run(main())


def training_groups(servers: FakeServers) -> list[IssuedGroup]:
    """What the servers were given, but for evaluations, whose prompts have two samples too but batch index -1."""
    return [group for group in servers.issued if group.batch_index >= 0]


@pytest.mark.parametrize("delay", [0, 1, 2, 7])
def test_delay_mode_has_the_staleness_of_the_delay_and_every_group_once(tmp_path: Path, delay: int) -> None:
    config, servers = run_config(tmp_path, steps=5, delay=delay, evaluate_every=2), FakeServers()
    trainer, totals = run_whole(config, servers)
    for step in range(5):
        groups = trainer.trained[step].groups
        assert [group.issued.group_id for group in groups] == [*range(step * NUM_PROMPTS, (step + 1) * NUM_PROMPTS)]
        assert {step - group.oldest_version for group in groups} == {min(step, delay)}
    # each once, in order, also when several batches are sampled with one version
    assert [group.group_id for group in training_groups(servers)] == list(range(5 * NUM_PROMPTS))
    assert (totals.groups_issued, totals.groups_consumed, totals.groups_dropped) == (15, 15, 0)
    assert (totals.smallest_staleness, totals.largest_staleness) == (0, min(delay, 4))
    assert [lease.version for lease in trainer.leases] == [1, 2, 3, 4, 5]
    assert not any(lease.requests_in_flight for lease in trainer.leases)


@pytest.mark.parametrize("max_staleness", [1, 3])
def test_bounded_mode_keeps_its_bound_while_weights_change_under_responses(tmp_path: Path, max_staleness: int) -> None:
    config = run_config(tmp_path, steps=6, max_staleness=max_staleness)
    spanning = range(4, 6 * NUM_PROMPTS, 5)  # not 0 and 1, which are the groups of evaluations too
    servers = FakeServers(exact=False, spanning=spanning)
    trainer, totals = run_whole(config, servers)
    groups = [group for step in range(6) for group in trainer.trained[step].groups]
    assert max(Counter(group.issued.group_id for group in groups).values()) == 1
    found = [step - group.oldest_version for step in range(6) for group in trainer.trained[step].groups]
    assert 0 <= min(found) <= max(found) <= max_staleness
    assert (totals.smallest_staleness, totals.largest_staleness) == (min(found), max(found))
    assert totals.groups_issued == totals.groups_consumed == 6 * NUM_PROMPTS
    assert all(lease.requests_in_flight for lease in trainer.leases)
    assert any(group.newest_version > group.oldest_version for group in groups)


def test_every_due_version_is_evaluated_once(tmp_path: Path) -> None:
    config, servers = run_config(tmp_path, steps=5, delay=1, evaluate_every=2), FakeServers()
    trainer, totals = run_whole(config, servers)
    assert [result.policy_version for result in totals.evaluations] == [0, 2, 4, 5]
    evaluated = [(group.policy_version, group.group_id) for group in servers.issued if group.batch_index == -1]
    assert sorted(evaluated) == [(version, place) for version in (0, 2, 4, 5) for place in range(2)]
    told = [[result.policy_version for result in lease.evaluations] for lease in trainer.leases]
    assert told == [[0], [0], [0, 2], [0, 2], [0, 2, 4]]


def test_an_evaluation_after_a_resume_is_not_made_twice(tmp_path: Path) -> None:
    """The evaluation of the checkpoint's version is in the journal, or is made up for."""
    config = run_config(tmp_path, steps=4, delay=1, evaluate_every=1)

    async def main() -> tuple[list[EvaluationResult], FakeServers, CollectorTotals]:
        trainer = FakeTrainer(config)
        async with collecting(config, FakeServers()) as collector:
            first = await trainer.run(collector)
        trainer.checkpoint, again = 2, FakeServers()
        async with collecting(config, again, version=2) as collector:
            return first.evaluations, again, await trainer.run(collector)

    first, again, totals = asyncio.run(main())
    assert [result.policy_version for result in totals.evaluations] == [0, 1, 2, 3, 4]
    assert {group.policy_version for group in again.issued if group.batch_index == -1} == {3, 4}
    assert totals.evaluations[:3] == first[:3]
    assert [result.pass_at_1 for result in totals.evaluations] == [result.pass_at_1 for result in first]


class EqualRewards(FakeServers):
    async def collect(self, issued, sampling) -> CollectedGroup:
        responses = [msgspec.structs.replace(response, reward=1.0) for response in collected(issued).responses]
        return CollectedGroup(issued=issued, responses=responses)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_prompts_that_teach_nothing_end_the_run(tmp_path: Path, max_staleness: int) -> None:
    config = run_config(tmp_path, steps=2, delay=0, max_staleness=max_staleness, dynamic_sampling=True)

    reason = "61 groups were dropped for a batch of batch.num_prompts = 3, either because their rewards were equal"

    async def main() -> None:
        async with collecting(config, EqualRewards()) as collector:
            with pytest.raises(CollectorFailed, match=reason):
                await collector.batch(0, 5)

    with pytest.raises(ScheduleError, match=reason):
        asyncio.run(main())


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_group_that_could_not_be_graded_is_dropped_and_replaced(tmp_path: Path, max_staleness: int) -> None:
    """Two of every three, in the order in which they end: with a third in a row the run would end. A graded group waits
    for the thread that writes its routes, and one without grades does not; it must not be counted before it."""
    config = run_config(tmp_path, steps=4, delay=1, max_staleness=max_staleness)
    ended: list[int] = []

    def fails(group_id: int) -> bool:
        ended.append(group_id)
        return len(ended) % 3 != 0

    trainer, totals = run_whole(config, FailingGrades(fails, exact=not max_staleness))
    trained = [group for batch in trainer.trained.values() for group in batch.groups]
    assert [len(batch.groups) for batch in trainer.trained.values()] == [NUM_PROMPTS] * 4
    assert all(response.is_graded for group in trained for response in group.responses)
    assert {group.issued.group_id for group in trained} <= set(ended[2::3])
    assert totals.groups_consumed == 4 * NUM_PROMPTS
    assert 2 * 4 * NUM_PROMPTS <= totals.groups_not_graded == totals.groups_dropped
    assert totals.largest_staleness <= max(max_staleness, 1)
    told = [lease.metrics["reward/groups_not_graded"] for lease in trainer.leases]
    assert 0 < told[0] <= told[-1] <= totals.groups_not_graded
    assert told == sorted(told)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_a_step_without_a_single_grade_ends_the_run(tmp_path: Path, max_staleness: int) -> None:
    """As many groups in a row as a step has."""
    config = run_config(tmp_path, steps=4, delay=0, max_staleness=max_staleness)
    reason = (
        r"3 groups in a row could not be graded, the last one of prompt 'p\d': grader failed: KeyError: 'x'; correct"
    )

    async def main() -> None:
        servers = FailingGrades(lambda group_id: group_id > 1, exact=not max_staleness)
        async with collecting(config, servers) as collector:
            with pytest.raises(CollectorFailed, match=reason):
                await collector.batch(0, 5)

    with pytest.raises(GradingError, match=reason):
        asyncio.run(main())


def test_the_trainer_does_not_get_the_metadata_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_metadata(count: int) -> list[TokenizedPrompt]:
        return [
            TokenizedPrompt(msgspec.structs.replace(one.prompt, metadata={"tests": ["a"]}), one.token_ids)
            for one in tokenized_prompts(count)
        ]

    monkeypatch.setattr(collector_rig, "tokenized_prompts", with_metadata)
    servers = FakeServers()
    trainer, _ = run_whole(run_config(tmp_path, steps=2, delay=0), servers)
    assert {str(group.prompt.metadata) for group in training_groups(servers)} == {"{'tests': ['a']}"}
    trained = [group for batch in trainer.trained.values() for group in batch.groups]
    assert [group.issued.prompt.metadata for group in trained] == [None] * len(trained)


def test_of_a_large_batch_a_part_is_enough_to_know_a_broken_grader() -> None:
    watch = GradingWatch(num_prompts=512)
    good = collected(issued_groups([0])[0])
    bad = msgspec.structs.replace(good, grading_problem="grader died with exit status 9")
    for _ in range(MAX_GROUPS_IN_A_ROW - 1):
        watch.collected(bad)
    watch.collected(good)
    for _ in range(MAX_GROUPS_IN_A_ROW - 1):
        watch.collected(bad)
    with pytest.raises(GradingError, match=r"32 groups in a row .* grader died with exit status 9"):
        watch.collected(bad)


@pytest.mark.parametrize("over_sampling", [1.0, 3.0])
def test_dynamic_sampling_fills_batches_with_groups_that_teach(tmp_path: Path, over_sampling: float) -> None:
    config = run_config(tmp_path, steps=4, delay=1, dynamic_sampling=True, over_sampling=over_sampling)
    servers = FakeServers()
    trainer, totals = run_whole(config, servers)
    for step, batch in trainer.trained.items():
        assert [len({r.reward for r in group.responses}) for group in batch.groups] == [2] * NUM_PROMPTS
        assert {step - group.oldest_version for group in batch.groups} == {min(step, 1)}
    issued = training_groups(servers)
    assert sorted(group.group_id for group in issued) == list(range(len(issued)))
    assert totals.groups_dropped == len(issued) - 4 * NUM_PROMPTS > 0
    first_wave = [group.group_id for group in issued if group.batch_index == 0][: int(3 * over_sampling)]
    assert first_wave == list(range(int(3 * over_sampling)))


def test_a_failure_reaches_whoever_waits_and_whoever_asks_later(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=3, delay=1)

    async def main() -> None:
        servers = HeldServers()
        servers.fail_with = RuntimeError("server 0: all attempts failed")
        async with collecting(config, servers) as collector:
            waiting = asyncio.create_task(collector.batch(0, 5))
            await asyncio.sleep(0)
            servers.let_go.set()
            await asyncio.wait([waiting])
            later = (collector.batch(0, 5), collector.checkpoint_begin(0), collector.publish_end(1, []))
            for action in (waiting, *later):
                with pytest.raises(CollectorFailed, match="all attempts"):
                    await action

    with pytest.raises(RuntimeError, match="all attempts failed"):
        asyncio.run(main())


def scored_batch() -> tuple[Batch, BehaviorLogProbs]:
    batch = Batch(index=0, groups=[collected(group) for group in issued_groups(range(3))])
    return batch, scores_of(batch)


def test_scores_must_fit_the_batch() -> None:
    batch, scores = scored_batch()
    check_scores(batch, scores)
    values = [[array.copy() for array in responses] for responses in scores.log_probs]

    def refused(log_probs: list[list[np.ndarray]], reason: str, version: int = 0) -> None:
        with pytest.raises(ValueError, match=reason):
            check_scores(batch, BehaviorLogProbs(index=0, policy_version=version, log_probs=log_probs))

    refused(values, r"computed with version 1, sampled with \[0\]", version=1)
    refused(values[:-1], "2 groups instead of 3")
    refused([values[0][:-1], *values[1:]], "group 0: 1 responses instead of 2")
    refused([*values[:-1], [values[-1][0], values[-1][1][:-1]]], "group 2, response 1: float32 of shape")
    refused([[values[0][0].astype(np.float64), values[0][1]], *values[1:]], "response 0: float64")
    for wrong in (np.nan, -np.inf, 0.5):
        damaged = [[array.copy() for array in responses] for responses in values]
        damaged[1][0][0] = wrong
        refused(damaged, "group 1, response 0: a value is not finite, or above 0")


def test_what_a_step_trained_with_must_fit_its_batch() -> None:
    batch, scores = scored_batch()
    values = [[array.copy() for array in responses] for responses in scores.log_probs]
    values[0][0][0] = np.nan  # no update trained on it
    check_trained(batch, TrainedStep(step=0, policy_version=0, log_probs=values))
    check_trained(batch, TrainedStep(step=0, policy_version=0))
    for log_probs, reason in (
        (values[:-1], "log-probs of step 0: 2 groups instead of 3"),
        ([*values[:-1], [values[-1][0], values[-1][1][:-1]]], "group 2, response 1: float32 of shape"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_trained(batch, TrainedStep(step=0, policy_version=0, log_probs=log_probs))


def test_scores_of_several_versions_name_none() -> None:
    groups = [collected(group, versions=[0, 1]) for group in issued_groups(range(3), -1)]
    batch = Batch(index=0, groups=groups)
    check_scores(batch, scores_of(batch, -1))
    with pytest.raises(ValueError, match=r"computed with version 1, sampled with \[0, 1\]"):
        check_scores(batch, scores_of(batch, 1))
