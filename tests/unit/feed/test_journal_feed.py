"""Another run's journal in the collector's place: its batches as they were consumed, or all that is wrong with it."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from minpro_megatron.batching.stored_arrays import read_array
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_checksums import seal_groups
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_pruning import Pruned
from minpro_megatron.feed.journal_feed import JournalFeed, journal_problems
from minpro_megatron.records import BehaviorLogProbs, CollectedGroup, CollectorTotals, TrainedStep
from tests.support.journal_feeds import NUM_STEPS, config_for, make_feed
from tests.support.rollout_fakes import NUM_PROMPTS
from tests.support.stored_runs import StoredRun, behavior, with_kept_ids, with_versions, write_run


def test_every_batch_is_what_its_step_consumed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "stored", NUM_STEPS, change=lambda group: with_versions(group, [0, 0, 1, 2, 2]))
    feed = make_feed(tmp_path)
    feed.start(0)
    for step, stored in enumerate(run.steps):
        batch = feed.batch(step)
        assert batch.index == step
        for found, group in zip(batch.groups, stored.groups, strict=True):
            assert found.is_scored
            expected, issued = group.issued, found.issued
            assert (issued.group_id, issued.batch_index, issued.policy_version) == (expected.group_id, step, 0)
            assert issued.sampling_seeds == expected.sampling_seeds
            assert issued.prompt_token_ids.tolist() == expected.prompt_token_ids.tolist()
            assert (issued.prompt.id, issued.prompt.source) == (expected.prompt.id, expected.prompt.source)
            assert issued.prompt.text == f"text of {expected.prompt_token_ids.tolist()}"
            for response, wanted, scores in zip(found.responses, group.responses, behavior(group), strict=True):
                for name in ("token_ids", "policy_versions", "rollout_log_probs"):
                    np.testing.assert_array_equal(getattr(response, name), getattr(wanted, name), strict=True)
                np.testing.assert_array_equal(response.behavior_log_probs, scores, strict=True)
                assert (response.reward, response.finish_reason) == (wanted.reward, wanted.finish_reason)
                assert response.routed_experts is None
        feed.consumed(TrainedStep(step=step, policy_version=step))
        lease = feed.publish_begin(step + 1)
        assert (lease.version, lease.servers, lease.evaluations) == (step + 1, [], [])
        feed.publish_end(step + 1, [])
    assert feed.finish() == CollectorTotals(
        groups_issued=NUM_STEPS * NUM_PROMPTS, groups_consumed=NUM_STEPS * NUM_PROMPTS, groups_dropped=0,
        groups_not_graded=0, smallest_staleness=0, largest_staleness=NUM_STEPS - 1, versions_published=0,
        evaluations=[],
    )  # fmt: skip


def test_groups_keep_the_order_in_which_they_were_issued(tmp_path: Path) -> None:
    write_run(tmp_path / "stored", NUM_STEPS)
    with sqlite3.connect(tmp_path / "stored" / "journal.sqlite") as journal:
        journal.execute("UPDATE groups SET issued_version = 1 WHERE group_id = 3")  # issued again after a crash
        seal_groups(journal)
    ids = [group.issued.group_id for group in make_feed(tmp_path).batch(1).groups]
    assert ids == [4, 5, 3]


def test_fewer_steps_than_the_journal_has(tmp_path: Path) -> None:
    write_run(tmp_path / "stored", NUM_STEPS)
    totals = make_feed(tmp_path, "num_global_steps=2").finish()
    assert (totals.groups_consumed, totals.largest_staleness) == (2 * NUM_PROMPTS, 1)


def with_routes(group: CollectedGroup) -> CollectedGroup:
    routes = np.full((3, 2, 1), group.issued.group_id, np.uint8)
    responses = [msgspec.structs.replace(response, routed_experts=routes) for response in group.responses]
    return msgspec.structs.replace(group, responses=responses)


def test_routes_come_along_where_they_are_replayed(tmp_path: Path) -> None:
    write_run(tmp_path / "stored", NUM_STEPS, change=with_routes)
    for group in make_feed(tmp_path, "model.routing_replay=rollout").batch(1).groups:
        for response in group.responses:
            assert response.stored_routes is not None
            assert read_array(response.stored_routes).tolist() == [[[group.issued.group_id]] * 2] * 3
    assert make_feed(tmp_path).batch(1).groups[0].responses[0].stored_routes is None


def test_kept_ids_come_along_where_responses_were_sampled_with_top_k(tmp_path: Path) -> None:
    def with_supports(group: CollectedGroup) -> CollectedGroup:
        supports = np.arange(4, dtype=np.int32) + group.issued.group_id
        responses = [msgspec.structs.replace(response, supports=supports) for response in group.responses]
        return msgspec.structs.replace(group, responses=responses)

    write_run(tmp_path / "stored", NUM_STEPS, change=with_supports)
    for group in make_feed(tmp_path, "sampling.top_k=9").batch(1).groups:
        for response in group.responses:
            assert response.stored_supports is not None
            assert read_array(response.stored_supports).tolist() == [
                group.issued.group_id + place for place in range(4)
            ]
    with pytest.raises(ValueError, match=r"set sampling\.top_k as in the run that wrote it"):
        make_feed(tmp_path)


async def prune_files(journal: Journal, run: StoredRun) -> None:
    await journal.prune(before_step=2, what=Pruned.FILES)


async def prune_all_files(journal: Journal, run: StoredRun) -> None:
    await journal.prune(before_step=NUM_STEPS, what=Pruned.FILES)


@pytest.mark.parametrize("top_k", [0, 9])
@pytest.mark.parametrize(
    ("pruning", "of_run", "problem"),
    [
        (prune_files, None, "sampling.top_k, but the kept ids of global steps 0 to 1 are no longer in it"),
        (prune_all_files, 20, "sampling.top_k = 20, but the kept ids of global steps 0 to 2 are no longer in it"),
    ],
)
def test_pruned_kept_ids_are_not_replaced_by_the_whole_softmax(
    tmp_path: Path, top_k: int, pruning: Callable[..., Any], of_run: int | None, problem: str
) -> None:
    write_run(tmp_path / "stored", NUM_STEPS, change=with_kept_ids, while_open=pruning)
    if of_run is not None:
        (tmp_path / "stored" / "run.json").write_text(json.dumps({"sampling": {"top_k": of_run}}))
    (found,) = journal_problems(config_for(tmp_path, f"sampling.top_k={top_k}"))
    assert found == (
        f"debug.journal = {tmp_path / 'stored'}: its responses were sampled with {problem}, and the behavior log-probs "
        "are those among them; give the journal of a run with collector.journal_keep_routes=true"
    )


def test_a_run_without_top_k_is_trained_on_without_it(tmp_path: Path) -> None:
    write_run(tmp_path / "stored", NUM_STEPS)
    (tmp_path / "stored" / "run.json").write_text(json.dumps({"sampling": {"top_k": 0}}))
    assert journal_problems(config_for(tmp_path)) == []
    (found,) = journal_problems(config_for(tmp_path, "sampling.top_k=9"))
    assert found.endswith(
        "its run has sampling.top_k = 0, so there are no kept ids for sampling.top_k = 9; set it to 0"
    )


def other_sizes(group: CollectedGroup) -> CollectedGroup:
    return msgspec.structs.replace(group, responses=group.responses[:1])


async def prune(journal: Journal, run: StoredRun) -> None:
    await journal.prune(before_step=2)


@pytest.mark.parametrize(
    ("written", "overrides", "problem"),
    [
        ({"num_steps": 1}, [], "global steps 1 to 2 of num_global_steps = 3 are not in it (it holds 0); lower num_"),
        ({"scored": False}, [], "global steps 0 to 2 of num_global_steps = 3 are not in it (it holds none)"),
        ({"while_open": prune}, [], "the tokens of global steps 0 to 1 are no longer in it; give the journal of a run"),
        (
            {"change": other_sizes},
            [],
            "global step 0 consumed 3 groups of 1 responses, but this run has batch.num_prompts = 3 and "
            "batch.responses_per_prompt = 2; set them",
        ),
        ({}, ["batch.num_prompts=6"], "global step 0 consumed 3 groups of 2 responses, but this run has batch.num_p"),
        (
            {},
            ["sampling.max_prompt_tokens=1"],
            "it has prompts of up to 2 tokens; raise sampling.max_prompt_tokens = 1",
        ),
        (
            {"change": lambda group: with_versions(group, [0] * 7)},
            [],
            "it has responses of up to 7 tokens; raise sampling.max_response_tokens = 6",
        ),
        (
            {},
            ["model.routing_replay=scored", "checkpoint.every_steps=0"],
            "it holds no routes of scoring for model.routing_replay = scored",
        ),
        ({}, ["model.routing_replay=rollout"], "it lacks the servers' routes for model.routing_replay = rollout"),
        ({}, ["sampling.top_k=9"], "it lacks the kept ids of truncated sampling for sampling.top_k = 9; give the"),
    ],
)
def test_what_does_not_fit_is_named_before_training(
    tmp_path: Path, written: dict[str, Any], overrides: list[str], problem: str
) -> None:
    how: dict[str, Any] = {"num_steps": NUM_STEPS} | written
    write_run(tmp_path / "stored", **how)
    config = config_for(tmp_path, *overrides)
    (found,) = journal_problems(config)
    assert found.startswith(f"debug.journal = {tmp_path / 'stored'}: {problem}")
    with pytest.raises(ValueError, match=r"^debug\.journal = "):
        JournalFeed(config, str)


def test_a_journal_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no such file; give a run folder" in journal_problems(config_for(tmp_path))[0]


def test_tokens_of_another_model_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "stored", NUM_STEPS)
    feed = make_feed(tmp_path, vocabulary=20)
    with pytest.raises(
        ValueError, match=r"group 0 has the token id 2\d, but the vocabulary of model.hf_path has 20 tokens"
    ):
        feed.batch(0)


def test_tokens_that_are_pruned_while_training_goes_on(tmp_path: Path) -> None:
    steps: list[Callable[[], object]] = []

    async def prune_later(journal: Journal, run: StoredRun) -> None:
        feed = make_feed(tmp_path)
        assert len(feed.batch(0).groups) == NUM_PROMPTS
        await journal.prune(before_step=1)
        steps.append(lambda: feed.batch(0))

    write_run(tmp_path / "stored", NUM_STEPS, while_open=prune_later)
    with pytest.raises(JournalError, match="the tokens of group 0 are no longer in it"):
        steps[0]()


@pytest.mark.parametrize(
    ("what", "setting", "change"),
    [("kept ids", "sampling.top_k=9", with_kept_ids), ("routes", "model.routing_replay=rollout", with_routes)],
)
def test_kept_ids_and_routes_that_are_pruned_while_training_goes_on(
    tmp_path: Path, what: str, setting: str, change: Callable[[CollectedGroup], CollectedGroup]
) -> None:
    steps: list[Callable[[], object]] = []

    async def prune_later(journal: Journal, run: StoredRun) -> None:
        feed = make_feed(tmp_path, setting)
        assert len(feed.batch(0).groups) == NUM_PROMPTS
        await prune_files(journal, run)
        steps.append(lambda: feed.batch(1))

    write_run(tmp_path / "stored", NUM_STEPS, change=change, while_open=prune_later)
    with pytest.raises(JournalError) as refused:
        steps[0]()
    assert str(refused.value) == (
        f"{tmp_path / 'stored' / 'journal.sqlite'}: the {what} of group 3 (global step 1) are no longer in it: its run "
        "has removed them since this one started; give the journal of a run with collector.journal_keep_routes=true"
    )


def test_a_score_is_never_asked_for_again(tmp_path: Path) -> None:
    write_run(tmp_path / "stored", NUM_STEPS)
    with pytest.raises(AssertionError, match="are scored"):
        make_feed(tmp_path).scored(BehaviorLogProbs(index=0, policy_version=0, log_probs=[]))
