"""The collector's durable record of every group, in `run_dir/journal.sqlite`. Only the role `collect` opens it.

The states of a group are issued -> collected -> scored -> consumed (at a step), or dropped (by a filter, or because it
could not be graded). Each change of state is one transaction, committed when the call returns.
`buffer/journal_restore.py` rolls a journal back to a checkpoint.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from minpro_megatron.buffer.journal_checksums import (
    RESPONSE_COLUMNS,
    ResponseRow,
    checksum,
    seal_group_ids,
    seal_groups,
)
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_file import JournalFile
from minpro_megatron.buffer.journal_pruning import Pruned, prune_groups, release_free_pages
from minpro_megatron.buffer.journal_restore import (
    NOTHING_NEEDED,
    Needed,
    RestoredGroup,
    groups_with_files,
    restore_groups,
    roll_back,
)
from minpro_megatron.buffer.journal_rows import log_prob_rows, response_row
from minpro_megatron.buffer.route_files import Places, RouteFiles
from minpro_megatron.buffer.staleness import RUN_START, Beginning
from minpro_megatron.records import (
    Batch,
    CollectedGroup,
    CollectorTotals,
    EvaluationResult,
    IssuedGroup,
)

log = logging.getLogger(__name__)

MAX_DAMAGE_LINES = 20
# Those of a step that a restart has undone are replaced.
_INSERT_SCORES = (
    "INSERT OR REPLACE INTO {table} (log_probs, checksum, group_id, place)"
    " SELECT ?, ?, group_id, place FROM responses WHERE group_id = ? AND place = ?"
)


class Journal:
    """An open journal. `open` creates or opens one; `close` waits for the calls made before it."""

    def __init__(self, file: JournalFile, routes: RouteFiles) -> None:
        self._file = file
        self._routes = routes
        self._pruning = asyncio.Lock()
        self._closing = False

    @classmethod
    async def open(cls, run_dir: Path, may_write: Callable[[], None] = lambda: None) -> "Journal":
        """Raises JournalError if the file is damaged, has another format, or cannot be created. `may_write` is called
        before each change and raises if this process may no longer make changes."""
        return cls(await JournalFile.open(run_dir, may_write), RouteFiles(run_dir))

    async def close(self) -> None:
        self._closing = True
        async with self._pruning:
            await self._file.close()

    async def restore(
        self, version: int, num_prompts: int, delay_mode: bool, needed: Needed = NOTHING_NEEDED
    ) -> tuple[list[RestoredGroup], int]:
        """Rolls the journal back to the checkpoint of `version` (0: the run's start).

        Returns the groups that are not consumed at that point, in order of id, and the first id that was never used.
        Groups with tokens of later versions are sampled again, because those weights no longer exist. So are groups
        whose routes or supports have been removed, if these are `needed`, and damaged groups, with a warning. Raises
        JournalError if something that the checkpoint includes is missing, or is damaged and cannot be sampled again.
        """

        def work(connection: sqlite3.Connection) -> list[str]:
            try:
                return roll_back(connection, version, num_prompts, delay_mode, needed)
            except JournalError as error:
                raise JournalError(f"{self._file.path}: {error}") from None

        damaged = await self._file.transaction(work)
        for line in damaged[:MAX_DAMAGE_LINES]:
            log.warning("%s: %s", self._file.path, line)
        if len(damaged) > MAX_DAMAGE_LINES:
            log.warning("%s: %d more groups are damaged", self._file.path, len(damaged) - MAX_DAMAGE_LINES)
        with_files = await self._file.run(groups_with_files)
        await asyncio.to_thread(self._routes.remove_others, with_files)
        return await self._file.run(lambda connection: restore_groups(connection, self._routes))

    async def begin(self, beginning: Beginning) -> None:
        """Records the batch from which on the run was extended. Recording it again changes nothing."""
        insert, row = "INSERT OR REPLACE INTO beginnings VALUES (?, ?, ?)", (*beginning, checksum(*beginning))
        await self._file.transaction(lambda connection: connection.execute(insert, row))

    async def beginnings(self) -> list[Beginning]:
        """RUN_START and all later beginnings, in order."""
        query = "SELECT first_batch, version FROM beginnings ORDER BY first_batch"
        rows = await self._file.run(lambda connection: connection.execute(query).fetchall())
        return [RUN_START, *(Beginning(*row) for row in rows)]

    async def issue(self, groups: Sequence[IssuedGroup]) -> None:
        """Records groups that are about to be sampled. A group recorded before a crash may be recorded again."""
        rows = [
            (
                group.group_id,
                group.policy_version,
                group.batch_index,
                group.prompt.id,
                group.prompt.source,
                group.prompt_token_ids.tobytes(),
            )
            for group in groups
        ]

        def write(connection: sqlite3.Connection) -> None:
            insert = (
                "INSERT INTO groups (group_id, issued_version, batch_index, prompt_id, source, prompt_token_ids, state)"
                " VALUES (?, ?, ?, ?, ?, ?, 'issued') ON CONFLICT (group_id)"
                " DO UPDATE SET issued_version = excluded.issued_version, prompt_id = excluded.prompt_id,"
                " source = excluded.source, prompt_token_ids = excluded.prompt_token_ids WHERE state = 'issued'"
            )
            _expect_rows(connection.executemany(insert, rows), len(rows), "a group was issued twice")
            seal_group_ids(connection, (row[0] for row in rows))

        await self._file.transaction(write)

    async def collect(self, group: CollectedGroup, accepted: bool) -> CollectedGroup:
        """Records a group's responses. `accepted` is False for a group that is dropped; its routes and supports
        are not kept. Returns the group without these in memory: they are now in files."""
        group_id = group.issued.group_id
        stored = [Places()] * len(group.responses)
        if accepted:
            stored = await asyncio.to_thread(self._routes.write, group)
        rows = [response_row(group, place, of_response) for place, of_response in enumerate(stored)]
        versions = group.oldest_version, group.newest_version
        state = ("collected" if accepted else "dropped", *versions, len(rows), group_id)

        def write(connection: sqlite3.Connection) -> None:
            changed = connection.execute(
                "UPDATE groups SET state = ?, oldest_version = ?, newest_version = ?, group_size = ?"
                " WHERE group_id = ? AND state = 'issued'",
                state,
            )
            _expect_rows(changed, 1, f"group {group_id} was not issued, or is collected already")
            places = ", ".join("?" * len(ResponseRow._fields))
            connection.executemany(f"INSERT INTO responses ({RESPONSE_COLUMNS}) VALUES ({places})", rows)
            seal_group_ids(connection, [group_id])

        await self._file.transaction(write)
        return self._routes.without_arrays(group, stored)

    async def score(self, index: int, scored: Sequence[tuple[CollectedGroup, list[np.ndarray]]]) -> None:
        """Records the behavior log-probs of groups of batch `index`: for each group, one array per response."""

        def write(connection: sqlite3.Connection) -> None:
            rows = list(log_prob_rows("behavior", scored))
            insert = _INSERT_SCORES.format(table="behavior_scores")
            _expect_rows(connection.executemany(insert, rows), len(rows), f"batch {index} lacks responses")
            ids = [(group.issued.group_id,) for group, _ in scored]
            changed = connection.executemany(
                "UPDATE groups SET state = 'scored' WHERE group_id = ? AND state = 'collected'", ids
            )
            _expect_rows(changed, len(ids), f"batch {index} is not collected, or scored already")
            seal_groups(connection, "group_id = ?", ids)

        await self._file.transaction(write)

    async def consume(
        self,
        batch: Batch,
        staleness: Sequence[int],
        surplus: Sequence[int] = (),
        log_probs: Sequence[Sequence[np.ndarray]] = (),
    ) -> None:
        """Records that global step `batch.index` has trained on the batch. `staleness` has one value per group. The
        groups `surplus` were sampled for this batch and are not used. `log_probs` are the policy's log-probs at that
        step, or empty."""
        step = batch.index
        is_trained = 1 if log_probs else None
        rows = [
            (step, step, value, is_trained, group.issued.group_id)
            for group, value in zip(batch.groups, staleness, strict=True)
        ]

        def write(connection: sqlite3.Connection) -> None:
            changed = connection.executemany(
                "UPDATE groups SET state = 'consumed', consumed_step = ?, batch_index = ?, staleness = ?,"
                " trained = ? WHERE group_id = ? AND state = 'scored'",
                rows,
            )
            _expect_rows(changed, len(rows), f"batch {step} is not scored, or consumed already")
            trained = zip(batch.groups, log_probs or [[]] * len(batch.groups), strict=True)
            insert = _INSERT_SCORES.format(table="trained_scores")
            connection.executemany(insert, list(log_prob_rows("trained", trained)))
            dropped = [(group_id,) for group_id in surplus]
            connection.executemany("UPDATE groups SET state = 'dropped' WHERE group_id = ?", dropped)
            seal_group_ids(connection, (row[-1] for row in [*rows, *dropped]))

        await self._file.transaction(write)

    async def publish(self, version: int) -> None:
        """Records that the servers hold `version`. A version published again after a restart keeps its first time."""
        values = (version, time.time())
        insert = "INSERT OR IGNORE INTO versions VALUES (?, ?)"
        await self._file.transaction(lambda connection: connection.execute(insert, values))

    async def evaluate(self, result: EvaluationResult) -> None:
        """Records a held-out evaluation."""
        names = EvaluationResult.__struct_fields__
        values = [getattr(result, name) for name in names]
        insert = f"INSERT INTO evaluations ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"
        await self._file.transaction(lambda connection: connection.execute(insert, values))

    async def evaluations(self) -> list[EvaluationResult]:
        return await self._file.run(_evaluations)

    async def flush(self) -> None:
        """Returns when all records so far would survive a power cut. Called before a checkpoint relies on them."""
        await self._file.run(lambda connection: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())

    async def prune(self, before_step: int, what: Pruned = Pruned.EVERYTHING) -> None:
        """Removes the tokens, log-probs and files (routes and supports), or only the files, of groups consumed before
        `before_step` and of dropped groups of the same age. Their prompts, states, rewards and lengths stay.

        Pruning runs in pieces, so that other calls wait for at most one piece. `close` stops it after a piece, and so
        may a crash; the next pruning removes the rest.
        """
        async with self._pruning:
            looked_at: int | None = -1
            while looked_at is not None and not self._closing:
                work = partial(prune_groups, what=what, before_step=before_step, after=looked_at)
                group_ids, looked_at = await self._file.transaction(work)
                if group_ids:
                    await asyncio.to_thread(self._routes.remove, group_ids)
            while not self._closing and await self._file.run(release_free_pages):
                continue

    async def totals(self) -> CollectorTotals:
        """Totals of the journal so far. The staleness values are 0 if nothing was consumed."""
        return await self._file.run(_totals)


def _expect_rows(cursor: sqlite3.Cursor, num_rows: int, problem: str) -> None:
    if cursor.rowcount != num_rows:
        raise JournalError(f"journal: {problem} ({cursor.rowcount} of {num_rows} rows)")


def _evaluations(connection: sqlite3.Connection) -> list[EvaluationResult]:
    names = EvaluationResult.__struct_fields__
    query = f"SELECT {', '.join(names)} FROM evaluations ORDER BY policy_version, benchmark"
    return [EvaluationResult(**dict(zip(names, row, strict=True))) for row in connection.execute(query)]


_NOT_GRADED = "SELECT 1 FROM responses WHERE responses.group_id = groups.group_id AND reward IS NULL"


def _totals(connection: sqlite3.Connection) -> CollectorTotals:
    def count(condition: str) -> int:
        return connection.execute(f"SELECT count(*) FROM groups WHERE {condition}").fetchone()[0]

    query = "SELECT coalesce(min(staleness), 0), coalesce(max(staleness), 0) FROM groups WHERE state = 'consumed'"
    smallest, largest = connection.execute(query).fetchone()
    return CollectorTotals(
        groups_issued=count("1"),
        groups_consumed=count("state = 'consumed'"),
        groups_dropped=count("state = 'dropped'"),
        groups_not_graded=count(f"state = 'dropped' AND EXISTS ({_NOT_GRADED})"),
        smallest_staleness=smallest,
        largest_staleness=largest,
        versions_published=connection.execute("SELECT count(*) FROM versions WHERE version > 0").fetchone()[0],
        evaluations=_evaluations(connection),
    )
