"""A journal taken back to a checkpoint: of every group it is known whether it is ready, repeated, or forgotten."""

import json
import resource
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from minpro_megatron.batching.stored_arrays import read_array
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_pruning import Pruned
from minpro_megatron.buffer.journal_restore import Needed, RestoredGroup, roll_back
from minpro_megatron.buffer.route_files import FOLDER, RouteFiles
from minpro_megatron.records import Batch, CollectedGroup, EvaluationResult
from tests.support.journal_in_memory import InMemoryFile, in_memory
from tests.support.rollout_fakes import collected, issued_groups, log_probs_of, with_log_probs

# One group: (issued at, versions of its tokens, what became of it): "issued", "collected", "scored", "dropped", or the
# number of the step that consumed it. Two groups a batch.
Row = tuple[int, list[int], str | int]
NUM_PROMPTS = 2
READY, REPEATED, DROPPED = "ready", "repeated", "dropped"
EVALUATION = EvaluationResult(
    policy_version=0, pass_at_1=0.25, standard_error=0.1,
    mean_reward=0.25, not_graded=0, num_prompts=2, samples_per_prompt=2,
    mean_response_tokens=2.5, wall_time_s=0.1,
)  # fmt: skip


async def fill(journal: Journal, rows: Sequence[Row]) -> list[CollectedGroup]:
    """Brings one group after the other into its state; group g is of batch g // NUM_PROMPTS."""
    groups = []
    for group_id, (issued_version, versions, fate) in enumerate(rows):
        (issued,) = issued_groups([group_id], group_id // NUM_PROMPTS, issued_version)
        group = collected(issued, versions or [issued_version])
        groups.append(group)
        await journal.issue([issued])
        if fate != "issued":
            await journal.collect(group, accepted=fate != "dropped")
        if fate == "scored" or isinstance(fate, int):
            await journal.score(group_id // NUM_PROMPTS, with_log_probs([group]))
        if isinstance(fate, int):
            await journal.consume(Batch(index=fate, groups=[group]), [fate - issued_version])
    return groups


def fate(group: RestoredGroup) -> str:
    assert not (group.dropped and group.responses)
    return DROPPED if group.dropped else READY if group.responses else REPEATED


CONSUMED_0: list[Row] = [(0, [0], 0), (0, [0], 0)]


@pytest.mark.parametrize(
    ("version", "rows", "expected", "next_group"),
    [
        pytest.param(0, [], {}, 0, id="nothing happened"),
        pytest.param(0, [(0, [], "issued"), (0, [0], "collected")], {0: REPEATED, 1: READY}, 2, id="first rollouts"),
        pytest.param(0, [(0, [0], "scored"), (0, [0], "dropped")], {0: READY, 1: DROPPED}, 2, id="scored and dropped"),
        pytest.param(0, CONSUMED_0, {0: READY, 1: READY}, 2, id="consumed, but not in the checkpoint"),
        pytest.param(1, CONSUMED_0, {}, 2, id="consumed in the checkpoint"),
        pytest.param(
            1, [*CONSUMED_0, (0, [0], "scored"), (0, [0], "scored")], {2: READY, 3: READY}, 4, id="scored before it"
        ),
        pytest.param(
            1,
            [*CONSUMED_0, (1, [1], "collected"), (1, [], "issued"), (2, [2], "scored"), (2, [], "issued")],
            {2: READY, 3: REPEATED},
            4,
            id="later versions are forgotten",
        ),
        pytest.param(
            1,
            [*CONSUMED_0, (0, [0], 1), (0, [0], 1), (1, [1], 2), (1, [1], 2), (2, [2], "collected")],
            {2: READY, 3: READY, 4: READY, 5: READY},
            6,
            id="steps are undone",
        ),
    ],
)
@pytest.mark.parametrize("delay_mode", [True, False])
def test_what_becomes_of_each_group(
    version: int, rows: list[Row], expected: dict[int, str], next_group: int, delay_mode: bool
) -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        made = await fill(journal, rows)
        groups, found_next = await journal.restore(version, NUM_PROMPTS, delay_mode)
        assert ({group.group_id: fate(group) for group in groups}, found_next) == (expected, next_group)
        for group in groups:
            issued = made[group.group_id].issued
            assert (group.prompt_id, group.issued_version) == (issued.prompt.id, issued.policy_version)
            assert group.batch_index == (issued.batch_index if delay_mode else -1)
        assert (await journal.restore(version, NUM_PROMPTS, delay_mode))[1] == next_group  # a crash right after it

    in_memory(use)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((0, [0, 1], "scored"), READY),
        ((0, [0, 2], "scored"), REPEATED),  # a token of a later version
        ((0, [0, 1], "collected"), REPEATED),  # the weights that would score token 0 are gone
        ((1, [1, 1], "collected"), READY),
        ((0, [0, 2], "dropped"), REPEATED),
        ((0, [0, 1], "dropped"), DROPPED),
        ((0, [1, 2], 1), REPEATED),
        ((0, [0, 1], 1), READY),
    ],
)
def test_groups_of_several_versions_in_bounded_mode(row: Row, expected: str) -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        await fill(journal, [*CONSUMED_0, row])
        (group,), _ = await journal.restore(1, NUM_PROMPTS, False)
        assert fate(group) == expected

    in_memory(use)


def test_responses_and_scores_come_back_as_they_were() -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        made = await fill(journal, [(0, [0, 0, 1], "scored"), (0, [0, 1], 1), (1, [1], "collected")])
        groups, _ = await journal.restore(1, 0, False)
        assert [fate(group) for group in groups] == [READY, READY, READY]
        for found, group in zip(groups, made, strict=True):
            scores = log_probs_of([group])[0] if found.group_id < 2 else [None, None]
            for one, other, log_probs in zip(found.responses, group.responses, scores, strict=True):
                assert one.token_ids.tolist() == other.token_ids.tolist()
                assert one.rollout_log_probs.tolist() == other.rollout_log_probs.tolist()
                assert one.policy_versions.tolist() == other.policy_versions.tolist()
                assert (one.finish_reason, one.reward) == (other.finish_reason, other.reward)
                assert (one.behavior_log_probs is None) == (log_probs is None)
                if one.behavior_log_probs is not None and log_probs is not None:
                    assert one.behavior_log_probs.tolist() == log_probs.tolist()
        arrays = [groups[0].responses[0].token_ids, groups[0].responses[0].policy_versions]
        assert [array.dtype for array in arrays] == [np.int32, np.int32]

    in_memory(use)


def test_log_probs_of_updates_after_the_checkpoint_are_forgotten() -> None:
    """The repeated update may record none, where `collector.journal_ratios` was switched off."""

    async def use(journal: Journal, file: InMemoryFile) -> None:
        groups = await fill(journal, [(0, [0], "scored")] * 4)
        for step in range(2):
            own = groups[2 * step : 2 * step + 2]
            await journal.consume(Batch(index=step, groups=own), [0, 0], log_probs=log_probs_of(own))
        recorded = file.rows("SELECT DISTINCT group_id FROM trained_scores ORDER BY group_id")
        assert recorded == [(0,), (1,), (2,), (3,)]
        await journal.restore(1, NUM_PROMPTS, True)
        assert file.rows("SELECT trained FROM groups ORDER BY group_id") == [(1,), (1,), (None,), (None,)]
        assert file.rows("SELECT DISTINCT group_id FROM trained_scores ORDER BY group_id") == [(0,), (1,)]
        await journal.consume(Batch(index=1, groups=groups[2:]), [0, 0])
        assert file.rows("SELECT trained FROM groups ORDER BY group_id") == [(1,), (1,), (None,), (None,)]

    in_memory(use)


def test_versions_and_evaluations_after_the_checkpoint_are_forgotten() -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        await fill(journal, CONSUMED_0)
        for version in range(3):
            await journal.publish(version)
            await journal.evaluate(msgspec.structs.replace(EVALUATION, policy_version=version))
        await journal.restore(1, NUM_PROMPTS, True)
        assert [result.policy_version for result in await journal.evaluations()] == [0, 1]
        assert (await journal.totals()).versions_published == 1

    in_memory(use)


@pytest.mark.parametrize(
    ("version", "rows", "reason"),
    [
        (1, [], "version 1 has consumed 2 groups, the journal 0: .* restore both from the same backup, or start"),
        (2, CONSUMED_0, "version 2 has consumed 4 groups, the journal 2"),
        (1, [*CONSUMED_0, (0, [], "issued")], "1 groups sampled with versions before 1 are lost.* older than the"),
        (1, [*CONSUMED_0, (0, [0], "collected")], "1 groups sampled with versions before 1 are lost"),
    ],
)
def test_a_journal_older_than_the_checkpoint_is_refused_and_stays(version: int, rows: list[Row], reason: str) -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        await fill(journal, rows)
        before = file.rows("SELECT * FROM groups"), file.rows("SELECT * FROM responses")
        with pytest.raises(JournalError, match=reason):
            await journal.restore(version, NUM_PROMPTS, True)
        assert (file.rows("SELECT * FROM groups"), file.rows("SELECT * FROM responses")) == before

    in_memory(use)


def test_surplus_of_a_scored_batch_is_not_missed() -> None:
    """Group 2 is a third one for batch 1, which was scored without it before the checkpoint."""

    async def use(journal: Journal, file: InMemoryFile) -> None:
        await fill(journal, [*CONSUMED_0, (0, [0], "scored"), (0, [0], "scored")])
        (third,) = issued_groups([4], 1, 0)
        await journal.issue([third])
        await journal.collect(collected(third), accepted=True)
        groups, _ = await journal.restore(1, NUM_PROMPTS, True)
        assert [fate(group) for group in groups] == [READY, READY, DROPPED]

    in_memory(use)


def test_pruned_groups_are_repeated_where_the_bound_allows_it_and_dropped_ones_stay() -> None:
    rows: list[Row] = [*CONSUMED_0, (0, [0], "dropped"), (0, [0], 1), (1, [1], 1)]

    async def use(journal: Journal, file: InMemoryFile) -> None:
        await fill(journal, rows)
        await journal.prune(2)
        groups, _ = await journal.restore(2, NUM_PROMPTS, True)
        assert [fate(group) for group in groups] == [DROPPED]
        # a checkpoint older than what was kept
        with pytest.raises(JournalError, match="1 groups sampled with versions before 1 are lost"):
            await journal.restore(1, NUM_PROMPTS, True)
        groups, _ = await journal.restore(1, NUM_PROMPTS, False)
        assert [fate(group) for group in groups] == [DROPPED, REPEATED, REPEATED]

    in_memory(use)


def test_an_id_that_an_earlier_restore_repeated_is_not_lost_by_the_next_one() -> None:
    """Group 2 was issued at version 0, again at version 2 after a crash; the next crash goes back to version 1."""

    async def use(journal: Journal, file: InMemoryFile) -> None:
        await fill(journal, [*CONSUMED_0, (0, [], "issued"), (0, [0], 1), (1, [1], 1)])
        await journal.restore(2, NUM_PROMPTS, False)
        again = issued_groups([2], -1, 2)[0]
        await journal.issue([again])
        await journal.collect(collected(again), accepted=True)
        groups, next_group = await journal.restore(1, NUM_PROMPTS, False)
        assert ([group.group_id for group in groups], next_group) == ([2, 3, 4], 5)
        assert [fate(group) for group in groups] == [REPEATED, READY, READY]

    in_memory(use)


def test_a_restore_that_breaks_off_changes_nothing() -> None:
    def broken(connection: sqlite3.Connection) -> None:
        roll_back(connection, 0, NUM_PROMPTS, True)
        raise OSError("the power went away")

    async def use(journal: Journal, file: InMemoryFile) -> None:
        await fill(journal, CONSUMED_0)
        with pytest.raises(OSError, match="the power"):
            await file.transaction(broken)
        assert file.rows("SELECT state FROM groups") == [("consumed",)] * 2

    in_memory(use)


ROUTES = [np.arange(24, dtype=np.uint8).reshape(3, 4, 2), np.arange(8, dtype=np.int16).reshape(1, 4, 2) + 300]


async def fill_with_routes(journal: Journal) -> None:
    issued = issued_groups(range(3))
    await journal.issue(issued)
    await journal.collect(collected(issued[0], routes=ROUTES), accepted=True)
    await journal.collect(collected(issued[1], routes=[None, ROUTES[0]]), accepted=True)
    await journal.collect(collected(issued[2]), accepted=True)
    await journal.flush()


def test_routes_are_kept_in_files_and_come_back(tmp_path: Path) -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        await fill_with_routes(journal)
        assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["0.bin", "1.bin"]
        groups, _ = await journal.restore(0, NUM_PROMPTS, True)
        places = [response.stored_routes for group in groups for response in group.responses]
        found = [None if place is None else read_array(place) for place in places]
        for one, other in zip(found, [*ROUTES, None, ROUTES[0], None, None], strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.dtype == other.dtype
                assert one.tolist() == other.tolist()

    in_memory(use, tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "these routes cannot be read .*No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "these routes are damaged"),
        (lambda path: path.write_bytes(b""), "these routes are damaged"),
        (lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]), "these routes are damaged"),
    ],
)
def test_damaged_routes_are_named(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        await fill_with_routes(journal)
        damage(tmp_path / FOLDER / "0.bin")
        with pytest.raises(JournalError, match=f"{FOLDER}/0.bin: .*{reason}"):
            await journal.restore(0, NUM_PROMPTS, True)

    in_memory(use, tmp_path)


def test_routes_of_an_unknown_dtype_are_refused(tmp_path: Path) -> None:
    place = {"offset": 0, "shape": [1, 1, 1], "dtype": "<f8", "sha256": ""}
    with pytest.raises(JournalError, match=r"0.bin: routes of dtype '<f8'; known"):
        RouteFiles(tmp_path).verified(0, json.dumps(place))


def test_pruned_routes_are_removed(tmp_path: Path) -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        await fill_with_routes(journal)
        for group_id in range(2):
            group = collected(issued_groups([group_id])[0])
            await journal.score(group_id, with_log_probs([group]))
            await journal.consume(Batch(index=group_id, groups=[group]), [0])
        await journal.prune(1)
        assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["1.bin"]
        await journal.flush()

    in_memory(use, tmp_path)


def test_pruned_routes_leave_the_tokens_and_are_no_part_of_a_run_that_needs_them(tmp_path: Path) -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        issued = issued_groups(range(2))
        await journal.issue(issued)
        for step, group in enumerate([collected(one, routes=ROUTES) for one in issued]):
            await journal.collect(group, accepted=True)
            await journal.score(step, with_log_probs([group]))
            await journal.consume(Batch(index=step, groups=[group]), [0])
        await journal.prune(1, Pruned.FILES)
        assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["1.bin"]
        assert file.rows("SELECT count(*) FROM responses WHERE token_ids IS NULL") == [(0,)]
        groups, _ = await journal.restore(1, 1, True, Needed(routes=True))
        assert [(group.group_id, fate(group)) for group in groups] == [(1, READY)]
        groups, _ = await journal.restore(0, 1, True)
        assert [fate(group) for group in groups] == [READY, READY]
        groups, _ = await journal.restore(0, 1, True, Needed(routes=True))
        assert [fate(group) for group in groups] == [REPEATED, READY]

    in_memory(use, tmp_path)


SUPPORTS = [np.array([2, 1, 3, 4, 5, 6], np.int32), np.array([1, 7], np.int32)]


def test_supports_lie_beside_the_routes_and_come_back_with_them(tmp_path: Path) -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        issued = issued_groups(range(3))
        await journal.issue(issued)
        await journal.collect(collected(issued[0], routes=ROUTES, supports=SUPPORTS), accepted=True)
        kept = await journal.collect(collected(issued[1], supports=SUPPORTS), accepted=True)
        assert all(response.supports is None for response in kept.responses)
        await journal.collect(collected(issued[2], supports=SUPPORTS), accepted=False)
        assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["0.bin", "1.bin"]
        groups, _ = await journal.restore(0, NUM_PROMPTS, True, Needed(supports=True))
        responses = [response for group in groups for response in group.responses]
        for response, supports in zip(responses, 2 * SUPPORTS, strict=True):
            assert response.stored_supports is not None
            np.testing.assert_array_equal(read_array(response.stored_supports), supports, strict=True)
        for response, routes in zip(responses[:2], ROUTES, strict=True):
            assert response.stored_routes is not None
            np.testing.assert_array_equal(read_array(response.stored_routes), routes, strict=True)
        assert [response.stored_routes for response in responses[2:]] == [None, None]
        assert [response.stored_supports for response in responses[2:]] == [
            response.stored_supports for response in kept.responses
        ]
        path = tmp_path / FOLDER / "1.bin"
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(JournalError, match=f"{FOLDER}/1.bin: these kept ids are damaged"):
            await journal.restore(0, NUM_PROMPTS, True)

    in_memory(use, tmp_path)


@pytest.mark.parametrize("with_routes", [False, True])
def test_pruned_supports_are_no_part_of_a_run_that_needs_them(tmp_path: Path, with_routes: bool) -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        issued = issued_groups(range(2))
        await journal.issue(issued)
        routes = ROUTES if with_routes else []
        for step, group in enumerate([collected(one, routes=routes, supports=SUPPORTS) for one in issued]):
            await journal.collect(group, accepted=True)
            await journal.score(step, with_log_probs([group]))
            await journal.consume(Batch(index=step, groups=[group]), [0])
        await journal.prune(1, Pruned.FILES)
        assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["1.bin"]
        groups, _ = await journal.restore(0, 1, True)
        assert [fate(group) for group in groups] == [READY, READY]
        groups, _ = await journal.restore(0, 1, True, Needed(supports=True))
        assert [fate(group) for group in groups] == [REPEATED, READY]

    in_memory(use, tmp_path)


def test_routes_of_dropped_groups_and_what_a_crash_left_of_others_go(tmp_path: Path) -> None:
    async def use(journal: Journal, file: InMemoryFile) -> None:
        issued = issued_groups(range(3))
        await journal.issue(issued)
        await journal.collect(collected(issued[0], routes=ROUTES), accepted=False)
        assert not (tmp_path / FOLDER).exists()
        await journal.collect(collected(issued[1], routes=ROUTES), accepted=True)
        (tmp_path / FOLDER / "2.bin").write_bytes(b"written, but not recorded")
        await journal.restore(0, NUM_PROMPTS, True)
        assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["1.bin"]

    in_memory(use, tmp_path)


def test_routes_that_do_not_fit_are_named_and_a_full_disk_as_such(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def use(journal: Journal, file: InMemoryFile) -> None:
        issued = issued_groups([0])
        await journal.issue(issued)
        group = collected(issued[0], routes=[np.zeros(10_000, np.uint8)] * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(JournalError, match=f"{FOLDER}/0.bin: File too large$"):
                await journal.collect(group, accepted=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (tmp_path / FOLDER / "0.bin").unlink()
        (tmp_path / FOLDER / "0.bin").symlink_to("/dev/full")
        problem = f"{FOLDER}/0.bin: no space is left on the file system of .*; free some space, then launch again"
        with pytest.raises(JournalError, match=problem):
            await journal.collect(group, accepted=True)
        (tmp_path / FOLDER / "0.bin").unlink()
        assert file.rows("SELECT state FROM groups") == [("issued",)]
        await journal.collect(group, accepted=True)
        assert (await journal.restore(0, NUM_PROMPTS, True))[0][0].responses[1].stored_routes is not None

    in_memory(use, tmp_path)
