"""The collector's durable record of every group, in `run_dir/journal.sqlite`; only collect opens it.

States of a group: issued -> collected -> scored -> consumed (at a step); or dropped. A batch changes state
in one transaction. Calls return at once to the event loop: one thread owns the connection and works in
order of call.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from minpro_megatron.records import (
    Batch,
    BehaviorLogProbs,
    CollectorTotals,
    EvaluationResult,
    IssuedGroup,
)

Result = TypeVar("Result")

FILE_NAME = "journal.sqlite"
SCHEMA_VERSION = 1

# Arrays are little-endian bytes: token ids int32, log-probs float32, versions as int32 pairs (version,
# tokens).
_SCHEMA = """
CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY,
    batch_index INTEGER NOT NULL,
    policy_version INTEGER NOT NULL,
    prompt_id TEXT NOT NULL,
    prompt_token_ids BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('issued', 'collected', 'scored', 'consumed', 'dropped')),
    oldest_version INTEGER,
    consumed_step INTEGER,
    staleness INTEGER
) STRICT;
CREATE INDEX groups_by_batch ON groups (batch_index);
CREATE TABLE responses (
    group_id INTEGER NOT NULL REFERENCES groups (group_id),
    place INTEGER NOT NULL,
    sampling_seed INTEGER NOT NULL,
    token_ids BLOB NOT NULL,
    rollout_log_probs BLOB NOT NULL,
    policy_versions BLOB NOT NULL,
    finish_reason TEXT NOT NULL,
    reward REAL NOT NULL,
    behavior_log_probs BLOB,
    PRIMARY KEY (group_id, place)
) STRICT, WITHOUT ROWID;
CREATE TABLE versions (version INTEGER PRIMARY KEY, published_at REAL NOT NULL) STRICT;
CREATE TABLE evaluations (
    policy_version INTEGER PRIMARY KEY,
    pass_at_1 REAL NOT NULL,
    standard_error REAL NOT NULL,
    num_prompts INTEGER NOT NULL,
    samples_per_prompt INTEGER NOT NULL,
    mean_response_tokens REAL NOT NULL,
    wall_time_s REAL NOT NULL
) STRICT;
"""


class JournalError(RuntimeError):
    """The journal cannot be opened, or a change of state does not fit what it holds."""


def refuse_existing_journal(run_dir: Path) -> None:
    """Raises JournalError if the run folder has a journal: a run cannot be continued yet."""
    path = Path(run_dir) / FILE_NAME
    if path.exists():
        raise JournalError(
            f"{path}: this run folder already holds a run, and continuing a run is not supported; "
            f"give another name, or delete {run_dir}"
        )


class Journal:
    """An open journal. `open` makes a new one; `close` waits for what was called before it."""

    def __init__(self, connection: sqlite3.Connection, thread: ThreadPoolExecutor) -> None:
        self._connection = connection
        self._thread = thread

    @classmethod
    async def open(cls, run_dir: Path) -> "Journal":
        """A new journal. Raises JournalError if the folder has one or the file cannot be made."""
        refuse_existing_journal(run_dir)
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(thread, _create, Path(run_dir) / FILE_NAME)
        except (sqlite3.Error, OSError) as error:
            thread.shutdown()
            raise JournalError(f"{Path(run_dir) / FILE_NAME}: cannot be created ({error})") from None
        return cls(connection, thread)

    async def close(self) -> None:
        await self._run(lambda connection: connection.close())
        self._thread.shutdown()

    async def issue(self, groups: Sequence[IssuedGroup]) -> None:
        """Records groups that are about to be sampled."""
        rows = [
            (
                group.group_id,
                group.batch_index,
                group.policy_version,
                group.prompt.id,
                group.prompt_token_ids.tobytes(),
            )
            for group in groups
        ]

        def write(connection: sqlite3.Connection) -> None:
            insert = (
                "INSERT INTO groups (group_id, batch_index, policy_version, prompt_id,"
                " prompt_token_ids, state) VALUES (?, ?, ?, ?, ?, 'issued')"
            )
            connection.executemany(insert, rows)

        await self._transaction(write)

    async def collect(self, batch: Batch) -> None:
        """Records the responses of all groups of a batch."""

        def write(connection: sqlite3.Connection) -> None:
            oldest = [(group.oldest_version, group.issued.group_id) for group in batch.groups]
            changed = connection.executemany(
                "UPDATE groups SET state = 'collected', oldest_version = ? WHERE group_id = ? AND state = 'issued'",
                oldest,
            )
            _expect_rows(changed, len(oldest), f"batch {batch.index} was not issued, or is collected already")
            rows = [
                (
                    group.issued.group_id,
                    place,
                    group.issued.sampling_seeds[place],
                    response.token_ids.tobytes(),
                    response.rollout_log_probs.tobytes(),
                    _spans(response.policy_versions).tobytes(),
                    response.finish_reason,
                    response.reward,
                )
                for group in batch.groups
                for place, response in enumerate(group.responses)
            ]
            insert = (
                "INSERT INTO responses (group_id, place, sampling_seed, token_ids, rollout_log_probs,"
                " policy_versions, finish_reason, reward) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            )
            connection.executemany(insert, rows)

        await self._transaction(write)

    async def score(self, batch: Batch, scores: BehaviorLogProbs) -> None:
        """Records a batch's behavior log-probs."""

        def write(connection: sqlite3.Connection) -> None:
            rows = [
                (log_probs.tobytes(), group.issued.group_id, place)
                for group, responses in zip(batch.groups, scores.log_probs, strict=True)
                for place, log_probs in enumerate(responses)
            ]
            update = "UPDATE responses SET behavior_log_probs = ? WHERE group_id = ? AND place = ?"
            _expect_rows(connection.executemany(update, rows), len(rows), f"batch {batch.index} lacks responses")
            ids = [(group.issued.group_id,) for group in batch.groups]
            changed = connection.executemany(
                "UPDATE groups SET state = 'scored' WHERE group_id = ? AND state = 'collected'", ids
            )
            _expect_rows(changed, len(ids), f"batch {batch.index} is not collected, or scored already")

        await self._transaction(write)

    async def consume(self, batch: Batch, step: int, staleness: Sequence[int]) -> None:
        """Records that global step `step` has trained on the batch; `staleness` has one value a group."""
        rows = [(step, value, group.issued.group_id) for group, value in zip(batch.groups, staleness, strict=True)]

        def write(connection: sqlite3.Connection) -> None:
            changed = connection.executemany(
                "UPDATE groups SET state = 'consumed', consumed_step = ?, staleness = ?"
                " WHERE group_id = ? AND state = 'scored'",
                rows,
            )
            _expect_rows(changed, len(rows), f"batch {batch.index} is not scored, or consumed already")

        await self._transaction(write)

    async def publish(self, version: int) -> None:
        """Records that the servers hold `version`."""
        values = (version, time.time())
        await self._transaction(lambda connection: connection.execute("INSERT INTO versions VALUES (?, ?)", values))

    async def evaluate(self, result: EvaluationResult) -> None:
        """Records a held-out evaluation."""
        values = (
            result.policy_version,
            result.pass_at_1,
            result.standard_error,
            result.num_prompts,
            result.samples_per_prompt,
            result.mean_response_tokens,
            result.wall_time_s,
        )
        insert = "INSERT INTO evaluations VALUES (?, ?, ?, ?, ?, ?, ?)"
        await self._transaction(lambda connection: connection.execute(insert, values))

    async def totals(self) -> CollectorTotals:
        """What the journal holds by now; a staleness is 0 if nothing was consumed."""
        return await self._run(_totals)

    async def _transaction(self, write: Callable[[sqlite3.Connection], object]) -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            try:
                write(connection)
                connection.execute("COMMIT")
            except BaseException:
                connection.execute("ROLLBACK")
                raise

        await self._run(work)

    async def _run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._connection)
        except sqlite3.Error as error:
            raise JournalError(f"{FILE_NAME}: {error}") from error


def _expect_rows(cursor: sqlite3.Cursor, num_rows: int, problem: str) -> None:
    if cursor.rowcount != num_rows:
        raise JournalError(f"{FILE_NAME}: {problem} ({cursor.rowcount} of {num_rows} rows)")


def _spans(policy_versions: np.ndarray) -> np.ndarray:
    """Run lengths: (version, tokens) pairs, int32. Nearly all responses have one version from end to end."""
    starts = np.flatnonzero(np.diff(policy_versions, prepend=policy_versions[0] - 1))
    lengths = np.diff(starts, append=len(policy_versions))
    return np.stack([policy_versions[starts], lengths], axis=1).astype(np.int32)


def _totals(connection: sqlite3.Connection) -> CollectorTotals:
    def count(condition: str) -> int:
        return connection.execute(f"SELECT count(*) FROM groups WHERE {condition}").fetchone()[0]

    query = "SELECT coalesce(min(staleness), 0), coalesce(max(staleness), 0) FROM groups WHERE state = 'consumed'"
    smallest, largest = connection.execute(query).fetchone()
    names = EvaluationResult.__struct_fields__
    query = f"SELECT {', '.join(names)} FROM evaluations ORDER BY policy_version"
    evaluations = connection.execute(query).fetchall()
    return CollectorTotals(
        groups_issued=count("1"),
        groups_consumed=count("state = 'consumed'"),
        groups_dropped=count("state = 'dropped'"),
        smallest_staleness=smallest,
        largest_staleness=largest,
        versions_published=connection.execute("SELECT count(*) FROM versions").fetchone()[0],
        evaluations=[EvaluationResult(**dict(zip(names, row, strict=True))) for row in evaluations],
    )


def _create(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, isolation_level=None)
    # Exclusive: WAL then needs no memory shared between processes, which network filesystems do not have.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA journal_mode = WAL")
    # A commit survives the end of the process; after a power cut the last ones may be missing, never torn.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    return connection
