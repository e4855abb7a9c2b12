"""The journal: every group's states in order, each exactly once; a refused or failed transition changes nothing."""

import asyncio
import random
import resource
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.buffer import journal_file
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_file import FILE_NAME, SCORES
from minpro_megatron.buffer.journal_rows import version_spans
from minpro_megatron.records import Batch, EvaluationResult
from tests.support.journals import collect, in_journal, nothing
from tests.support.pruned_journals import fill_with_consumed, left_to_prune, small_pieces
from tests.support.rollout_fakes import (
    NUM_PROMPTS,
    RESPONSES,
    collected,
    issued_groups,
    log_probs_of,
    scores_of,
    with_log_probs,
)

RESULT = EvaluationResult(
    policy_version=0, pass_at_1=0.25, standard_error=0.1,
    mean_reward=0.25, not_graded=0, num_prompts=2, samples_per_prompt=2,
    mean_response_tokens=2.5, wall_time_s=0.1,
)  # fmt: skip


def batch(index: int, version: int = 0) -> Batch:
    group_ids = range(index * NUM_PROMPTS, (index + 1) * NUM_PROMPTS)
    return Batch(index=index, groups=[collected(group) for group in issued_groups(group_ids, index, version)])


async def train(journal: Journal, made: Batch, staleness: int = 0) -> None:
    await collect(journal, made.groups)
    await journal.score(made.index, with_log_probs(made.groups))
    await journal.consume(made, [staleness] * NUM_PROMPTS)


def rows(run_dir: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(run_dir / FILE_NAME)) as connection:
        return connection.execute(query).fetchall()


def states(run_dir: Path) -> list[tuple[str, int | None, int | None]]:
    return rows(run_dir, "SELECT state, consumed_step, staleness FROM groups ORDER BY group_id")


def test_a_batch_goes_through_its_states(tmp_path: Path) -> None:
    made = batch(1)

    async def use(journal: Journal) -> None:
        await collect(journal, made.groups)
        await journal.score(1, with_log_probs(made.groups))
        await journal.consume(made, [1] * NUM_PROMPTS, log_probs=log_probs_of(made.groups))
        await journal.publish(1)
        await journal.evaluate(RESULT)
        totals = await journal.totals()
        assert (totals.groups_issued, totals.groups_consumed, totals.groups_dropped) == (NUM_PROMPTS, NUM_PROMPTS, 0)
        assert (totals.smallest_staleness, totals.largest_staleness, totals.versions_published) == (1, 1, 1)
        assert totals.evaluations == [RESULT]

    in_journal(tmp_path, use)
    assert states(tmp_path) == [("consumed", 1, 1)] * NUM_PROMPTS
    stored = rows(
        tmp_path,
        "SELECT token_ids, rollout_log_probs, policy_versions, behavior.log_probs, trained.log_probs, sampling_seed,"
        " reward, num_tokens FROM responses JOIN behavior_scores AS behavior USING (group_id, place)"
        " JOIN trained_scores AS trained USING (group_id, place) ORDER BY group_id, place",
    )
    given = [response for group in made.groups for response in group.responses]
    scores = [log_probs for of_group in scores_of(made).log_probs for log_probs in of_group]
    assert len(stored) == len(given) == NUM_PROMPTS * RESPONSES
    for found, response, log_probs in zip(stored, given, scores, strict=True):
        tokens, rollout, versions, behavior, of_training, seed, reward, num_tokens = found
        assert np.frombuffer(tokens, "<i4").tolist() == response.token_ids.tolist()
        assert rollout == response.rollout_log_probs.tobytes()
        assert behavior == of_training == log_probs.tobytes()
        assert np.frombuffer(versions, "<i4").tolist() == [0, len(response.token_ids)]
        assert (reward, num_tokens) == (seed % 2, len(response.token_ids))


def test_nothing_happens_twice_or_out_of_order(tmp_path: Path) -> None:
    made = batch(0)
    issued = [group.issued for group in made.groups]
    scores = with_log_probs(made.groups)

    async def refused(action: Awaitable[object], reason: str) -> None:
        with pytest.raises(JournalError, match=reason):
            await action

    async def use(journal: Journal) -> None:
        await refused(journal.collect(made.groups[0], True), "group 0 was not issued")
        await journal.issue(issued)
        await refused(journal.score(0, scores), r"lacks responses \(0 of 6 rows\)")
        await journal.collect(made.groups[0], True)
        await refused(journal.collect(made.groups[0], True), "group 0 .* is collected already")
        await refused(journal.issue(issued), r"issued twice \(2 of 3 rows\)")
        await refused(journal.score(0, scores), "lacks responses")
        for group in made.groups[1:]:
            await journal.collect(group, True)
        await refused(journal.consume(made, [0] * NUM_PROMPTS), "batch 0 is not scored")
        await journal.score(0, scores)
        await refused(journal.score(0, scores), "scored already")
        await journal.consume(made, [0] * NUM_PROMPTS)
        await refused(journal.consume(made, [0] * NUM_PROMPTS), "consumed already")
        await refused(journal.collect(made.groups[0], True), "collected already")

    in_journal(tmp_path, use)
    assert states(tmp_path) == [("consumed", 0, 0)] * NUM_PROMPTS


def test_a_refused_transition_leaves_nothing_behind(tmp_path: Path) -> None:
    made = batch(0)

    async def use(journal: Journal) -> None:
        await collect(journal, made.groups)
        await journal.score(0, with_log_probs(made.groups[:-1]))
        with pytest.raises(JournalError, match=r"batch 0 is not scored, or consumed already \(2 of 3 rows\)"):
            await journal.consume(made, [0] * NUM_PROMPTS)

    in_journal(tmp_path, use)
    assert [state for state, step, _ in states(tmp_path) if step is None] == ["scored", "scored", "collected"]


def test_dropped_groups_and_surplus_are_counted(tmp_path: Path) -> None:
    made, other = batch(0), [collected(group) for group in issued_groups([7, 8])]

    async def use(journal: Journal) -> None:
        await journal.issue([group.issued for group in other])
        await journal.collect(other[0], accepted=False)
        await journal.collect(other[1], accepted=True)
        await collect(journal, made.groups)
        await journal.score(0, with_log_probs(made.groups))
        await journal.consume(made, [0] * NUM_PROMPTS, surplus=[8])
        totals = await journal.totals()
        assert (totals.groups_issued, totals.groups_consumed, totals.groups_dropped) == (5, 3, 2)

    in_journal(tmp_path, use)
    assert states(tmp_path)[3:] == [("dropped", None, None)] * 2


@pytest.mark.parametrize(
    ("versions", "spans"),
    [([3, 3, 3, 4, 5, 5], [[3, 3], [4, 1], [5, 2]]), ([0], [[0, 1]]), ([2, 2], [[2, 2]]), ([1, 0], [[1, 1], [0, 1]])],
)
def test_versions_are_kept_as_spans(versions: list[int], spans: list[list[int]]) -> None:
    assert version_spans(np.asarray(versions, dtype=np.int32)).tolist() == spans


def test_a_journal_goes_on_where_it_was_closed(tmp_path: Path) -> None:
    made = batch(0)
    in_journal(tmp_path, lambda journal: journal.issue([group.issued for group in made.groups]))

    async def use(journal: Journal) -> None:
        for group in made.groups:
            await journal.collect(group, True)
        await journal.publish(1)
        await journal.publish(1)  # once more after a restart
        assert (await journal.totals()).versions_published == 1

    in_journal(tmp_path, use)
    assert states(tmp_path) == [("collected", None, None)] * NUM_PROMPTS


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda path: path.write_bytes(b"this is no database" * 100),
            "cannot be opened .*not a database: the file is damaged; restore",
        ),
        (lambda path: path.mkdir(), "cannot be opened .*unable to open"),
        (
            lambda path: sqlite3.connect(path).execute("PRAGMA user_version = 1").connection.close(),
            "cannot be opened .*format 1, this version reads 8; continue with the version that started",
        ),
    ],
)
def test_a_journal_that_cannot_be_opened_is_named(tmp_path: Path, damage: Callable, reason: str) -> None:
    damage(tmp_path / FILE_NAME)
    with pytest.raises(JournalError, match=f"{FILE_NAME}: {reason}"):
        in_journal(tmp_path, nothing)


def test_a_journal_has_one_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use(journal: Journal) -> None:
        monkeypatch.setattr(journal_file.sqlite3, "connect", partial(sqlite3.connect, timeout=0.01))
        with pytest.raises(JournalError, match=r"cannot be opened .*locked"):
            await Journal.open(tmp_path)

    in_journal(tmp_path, use)


def test_pruning_keeps_what_groups_were_and_gives_their_space_back(tmp_path: Path) -> None:
    long = [0] * 20_000  # tokens a response

    async def use(journal: Journal) -> None:
        for index in range(3):
            made = Batch(index=index, groups=[collected(group, long) for group in issued_groups([index], index)])
            await collect(journal, made.groups)
            await journal.score(index, with_log_probs(made.groups))
            await journal.consume(made, [0], (), log_probs_of(made.groups))
        await journal.issue(issued_groups([3]))
        await journal.collect(collected(issued_groups([3])[0], long), accepted=False)
        await journal.flush()
        before = (tmp_path / FILE_NAME).stat().st_size
        assert before > 4 * RESPONSES * 8 * len(long)
        assert (tmp_path / f"{FILE_NAME}-wal").stat().st_size == 0
        await journal.prune(2)
        await journal.flush()
        assert (tmp_path / FILE_NAME).stat().st_size < before / 2

    in_journal(tmp_path, use)
    assert [state for state, *_ in states(tmp_path)] == [*["consumed"] * 3, "dropped"]
    kept = rows(tmp_path, "SELECT group_id FROM responses WHERE token_ids IS NOT NULL")
    assert kept == [(2,)] * RESPONSES  # of step 2; the dropped group is as old as steps 0 and 1
    assert rows(tmp_path, "SELECT DISTINCT num_tokens, reward IS NULL FROM responses") == [(len(long), 0)]
    arrays = "rollout_log_probs, policy_versions, routes"
    assert set(rows(tmp_path, f"SELECT {arrays} FROM responses WHERE group_id IN (0, 1, 3)")) == {(None,) * 3}
    for table in SCORES:
        assert rows(tmp_path, f"SELECT group_id FROM {table}") == [(2,)] * RESPONSES


def test_others_do_not_wait_until_a_pruning_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    seen = []

    async def use(journal: Journal) -> None:
        await fill_with_consumed(journal, 8)
        pruning = asyncio.create_task(journal.prune(8))
        await asyncio.sleep(0)
        version = 0
        while not pruning.done():
            version += 1
            await journal.publish(version)
            seen.append(await left_to_prune(journal))
        await pruning
        assert await left_to_prune(journal) == (0, 0)

    in_journal(tmp_path, use)
    groups_left = {groups for groups, _ in seen}
    assert len(groups_left - {0, 8}) >= 3  # while tokens are forgotten
    pages_left = {pages for groups, pages in seen if groups == 0}
    assert len(pages_left) >= 5  # while pages are given back: there are far more of them than a piece has


@contextmanager
def small_files(journal: Journal) -> Iterator[None]:
    """Within: the kernel refuses a file that grows above a limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk(journal: Journal) -> Iterator[None]:
    """Within: SQLite finds no room for more pages, which it reports as it does a full disk."""
    connection, thread = journal._file._connection, journal._file._thread
    thread.submit(connection.execute, "PRAGMA max_page_count = 20").result()
    yield
    thread.submit(connection.execute, "PRAGMA max_page_count = 1000000").result()


@pytest.mark.parametrize(
    ("obstacle", "told"),
    [
        (small_files, r"disk I/O error, though the disk is not full; check for a quota, a limit on the size of files"),
        (full_disk, r"no space is left on the file system of .*; free some space, then launch again$"),
    ],
)
def test_a_journal_that_cannot_grow_costs_nothing_that_was_recorded(tmp_path: Path, obstacle, told: str) -> None:
    groups = [collected(group, [0] * 5_000) for group in issued_groups(range(20))]
    recorded = 0

    async def use(journal: Journal) -> None:
        async def collect_all() -> None:
            nonlocal recorded
            for group in groups:
                await journal.collect(group, True)
                recorded += 1

        await journal.issue([group.issued for group in groups])
        with obstacle(journal), pytest.raises(JournalError, match=f"journal.sqlite: {told}"):
            await collect_all()
        await journal.collect(groups[recorded], True)  # there is space again

    in_journal(tmp_path, use)
    assert 0 < recorded < len(groups) - 1
    expected = [("collected",)] * (recorded + 1) + [("issued",)] * (len(groups) - recorded - 1)
    assert rows(tmp_path, "SELECT state FROM groups ORDER BY group_id") == expected
    assert rows(tmp_path, "SELECT count(*) FROM responses") == [((recorded + 1) * RESPONSES,)]


# Everything that a transaction can change.
STATE = (
    "SELECT group_id, state, consumed_step, count(token_ids), count(log_probs) FROM groups"
    " LEFT JOIN responses USING (group_id) LEFT JOIN behavior_scores USING (group_id, place) GROUP BY group_id"
)


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[tuple]]]:
    """A journal as the end of its process leaves it, with what was recorded in the WAL; and its states in order."""
    folder = tmp_path_factory.mktemp("torn")
    in_journal(folder, nothing)  # the tables are in the file, all that follows in the WAL
    kept, history = folder / "kept", [[]]

    async def use(journal: Journal) -> None:
        async def step(action: Awaitable[object]) -> None:
            await action
            history.append(await journal._file.run(lambda connection: connection.execute(STATE).fetchall()))

        for one in (batch(0, version=0), batch(1, version=1)):
            await step(journal.issue([group.issued for group in one.groups]))
            for group in one.groups:
                await step(journal.collect(group, True))
            await step(journal.score(one.index, with_log_probs(one.groups)))
            await step(journal.consume(one, [0] * NUM_PROMPTS))
        kept.mkdir()
        for name in (FILE_NAME, f"{FILE_NAME}-wal"):
            shutil.copy(folder / name, kept / name)

    in_journal(folder, use)
    assert len(history) == 13
    return kept, history


@pytest.mark.parametrize("seed", range(20))
def test_of_a_torn_wal_whole_transactions_stay(tmp_path: Path, torn: tuple[Path, list[list[tuple]]], seed: int) -> None:
    """Cut at any length, or with a wrong bit; then two checkpoints are asked for: each is restored, or refused."""
    folder, history = torn
    rng = random.Random(seed)
    damaged = shutil.copytree(folder, tmp_path / "run")
    wal = damaged / f"{FILE_NAME}-wal"
    data = bytearray(wal.read_bytes())
    place = rng.randrange(len(data))
    if seed % 2:
        data[place] ^= 1 << rng.randrange(8)
    else:
        del data[place:]
    wal.write_bytes(data)

    async def use(journal: Journal) -> None:
        found = await journal._file.run(lambda connection: connection.execute(STATE).fetchall())
        assert found in history[:-1]
        consumed = {step for _, _, step, *_ in found if step is not None}
        with pytest.raises(JournalError, match=r"the checkpoint of version 2 .* do not belong together; restore both"):
            await journal.restore(2, NUM_PROMPTS, True)
        if consumed != {0}:
            with pytest.raises(JournalError, match=r"the checkpoint of version 1 .* the journal 0"):
                await journal.restore(1, NUM_PROMPTS, True)
            return
        groups, next_group = await journal.restore(1, NUM_PROMPTS, True)
        assert next_group == len(found)
        assert [group.group_id for group in groups] == [row[0] for row in found[NUM_PROMPTS:]]
        assert [bool(group.responses) for group in groups] == [row[1] != "issued" for row in found[NUM_PROMPTS:]]

    in_journal(damaged, use)
