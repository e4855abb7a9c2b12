"""The journal's SQLite file: its tables, how it is opened, and the transactions, which run in a single thread."""

import asyncio
import errno
import fcntl
import logging
import sqlite3
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from minpro_megatron.buffer.journal_errors import JournalError, explained, problem

Result = TypeVar("Result")
log = logging.getLogger(__name__)

FILE_NAME = "journal.sqlite"
SCHEMA_VERSION = 8
_OF_EPISODES = ("loss_mask BLOB", "turns TEXT")
_OF_SUPPORTS = ("supports TEXT", "supports_checksum INTEGER")
# The formats that can be upgraded in place, each with the columns of `responses` that it lacks. All of them lack the
# tables of scores and `groups.trained`: their scores are in `responses`, and stay there.
MISSING_COLUMNS = {5: (*_OF_EPISODES, *_OF_SUPPORTS), 6: _OF_SUPPORTS, 7: ()}
# Arrays of long responses have about 100 KB. With SQLite's default of 4 KiB per page, writing them takes 1.5 times as
# long (benchmarks/collector_load.md).
PAGE_BYTES = 16384
# Errors of a lock request on a file system without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

GROUP_STATES = ("issued", "collected", "scored", "consumed", "dropped")
# Arrays are little-endian bytes: token ids int32, log-probs float32, versions as int32 pairs (version, tokens), and
# loss masks uint8, which are NULL if all tokens are sampled. `routes` and `supports` say where in the run's route files
# the arrays are (route_files.py). `turns` is JSON, NULL for a response to one request. The
# arrays of a pruned response and their checksums (journal_checksums.py) are NULL. The reward of a response that was not
# graded is NULL too; its group is dropped.
#
# Log-probs that the trainer sends have tables of their own, because a change of a row of `responses` would write all of
# its arrays again (benchmarks/collector_load.md). `groups.trained` is 1 once those of the update are recorded: without
# it, lost rows could not be told from an update that sent none.
SCORES = ("behavior_scores", "trained_scores")
_TABLES_OF_SCORES = "".join(
    f"""
CREATE TABLE {table} (
    group_id INTEGER NOT NULL REFERENCES groups (group_id) ON DELETE CASCADE,
    place INTEGER NOT NULL,
    log_probs BLOB NOT NULL,
    checksum INTEGER NOT NULL,
    PRIMARY KEY (group_id, place)
) STRICT, WITHOUT ROWID;
"""
    for table in SCORES
)
_SCHEMA = f"""
CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY,
    issued_version INTEGER NOT NULL,
    batch_index INTEGER NOT NULL,
    prompt_id TEXT NOT NULL,
    source TEXT NOT NULL,
    prompt_token_ids BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN {GROUP_STATES}),
    oldest_version INTEGER,
    newest_version INTEGER,
    consumed_step INTEGER,
    staleness INTEGER,
    group_size INTEGER,
    trained INTEGER,
    checksum INTEGER
) STRICT;
CREATE INDEX groups_by_step ON groups (consumed_step);
CREATE INDEX groups_by_state ON groups (state);
CREATE TABLE responses (
    group_id INTEGER NOT NULL REFERENCES groups (group_id) ON DELETE CASCADE,
    place INTEGER NOT NULL,
    sampling_seed INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,
    token_ids BLOB,
    rollout_log_probs BLOB,
    policy_versions BLOB,
    finish_reason TEXT NOT NULL,
    reward REAL,
    behavior_log_probs BLOB,
    trained_log_probs BLOB,
    routes TEXT,
    checksum INTEGER NOT NULL,
    arrays_checksum INTEGER,
    behavior_checksum INTEGER,
    trained_checksum INTEGER,
    routes_checksum INTEGER,
    loss_mask BLOB,
    turns TEXT,
    supports TEXT,
    supports_checksum INTEGER,
    PRIMARY KEY (group_id, place)
) STRICT, WITHOUT ROWID;
CREATE TABLE versions (version INTEGER PRIMARY KEY, published_at REAL NOT NULL) STRICT;
CREATE TABLE evaluations (
    policy_version INTEGER NOT NULL,
    benchmark TEXT NOT NULL,
    pass_at_1 REAL NOT NULL,
    standard_error REAL NOT NULL,
    mean_reward REAL NOT NULL,
    not_graded INTEGER NOT NULL,
    num_prompts INTEGER NOT NULL,
    samples_per_prompt INTEGER NOT NULL,
    mean_response_tokens REAL NOT NULL,
    wall_time_s REAL NOT NULL,
    PRIMARY KEY (policy_version, benchmark)
) STRICT, WITHOUT ROWID;
CREATE TABLE beginnings (
    first_batch INTEGER PRIMARY KEY,
    version INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) STRICT;
{_TABLES_OF_SCORES}
"""


class JournalFile:
    """An open journal file. One thread owns the connection and works in the order of the calls, so that callers never
    block the event loop on the disk."""

    def __init__(
        self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, path: Path, may_write: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._thread = thread
        self._may_write = may_write
        self.path = path

    @classmethod
    async def open(cls, run_dir: Path, may_write: Callable[[], None] = lambda: None) -> "JournalFile":
        """Opens the run folder's journal, or creates it. Raises JournalError if that is not possible. `may_write` is
        called in the journal's thread before each transaction; an error that it raises ends the transaction."""
        path = Path(run_dir) / FILE_NAME
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        try:
            connection = await asyncio.get_running_loop().run_in_executor(thread, _open, path)
        except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
            thread.shutdown()
            raise JournalError(f"{path}: cannot be opened ({problem(path, error)})") from None
        except JournalError:
            thread.shutdown()
            raise
        return cls(connection, thread, path, may_write)

    async def close(self) -> None:
        """Waits for the calls made before it."""
        await self.run(lambda connection: connection.close())
        self._thread.shutdown()

    async def transaction(self, write: Callable[[sqlite3.Connection], Result]) -> Result:
        """Returns the result of `write` once its changes are committed. If `write` raises, nothing has changed."""

        def work(connection: sqlite3.Connection) -> Result:
            self._may_write()
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = write(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk makes SQLite roll back by itself
                    connection.execute("ROLLBACK")
                raise
            return result

        return await self.run(work)

    async def run(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._connection)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise JournalError(explained(self.path, error)) from error


def has_locks(folder: Path) -> bool:
    """Whether the folder's file system supports the POSIX locks that SQLite uses. Some parallel file systems are
    mounted without them. If no file can be created for the check, locks are assumed."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            fcntl.lockf(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _NO_LOCKS
    return True


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    uri = f"{path.absolute().as_uri()}?mode=rwc"
    if not has_locks(path.parent):
        log.warning("%s: no locks on this file system; nothing keeps a second start of the run from opening it", path)
        uri += "&vfs=unix-none"  # SQLite then takes no locks; otherwise every request ends with "disk I/O error"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    try:
        _make_ready(connection, path)
    except BaseException:
        connection.close()  # it holds the lock
        raise
    return connection


def _make_ready(connection: sqlite3.Connection, path: Path) -> None:
    """Applies the settings and creates the tables of a new file. Raises JournalError for a file of another format."""
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # for a new file; an existing one keeps its page size
    # With an exclusive lock, WAL needs no memory shared between processes, which network file systems do not have.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # pruned pages go back to the disk
    connection.execute("PRAGMA journal_mode = WAL")
    # A commit survives the end of the process. After a power cut the last commits may be missing, but never partially.
    # `flush` is for what must survive a power cut too.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found == 0:
        connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    elif found in MISSING_COLUMNS:
        added = "".join(f"ALTER TABLE responses ADD COLUMN {column};" for column in MISSING_COLUMNS[found])
        added += f"ALTER TABLE groups ADD COLUMN trained INTEGER; {_TABLES_OF_SCORES}"
        connection.executescript(f"BEGIN IMMEDIATE; {added} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    elif found != SCHEMA_VERSION:
        raise JournalError(
            f"{path}: cannot be opened (it has format {found}, this version reads {SCHEMA_VERSION}; continue with the "
            "version that started the run)"
        )
