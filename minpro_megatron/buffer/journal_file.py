"""The journal's SQLite file: its tables, how it is opened, and the transactions that run in its one thread."""

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
SCHEMA_VERSION = 5
# A response's arrays are 100 KB where responses are long: with SQLite's 4 KiB a page, writing them takes half as long
# again (benchmarks/collector_load.md).
PAGE_BYTES = 16384
# What locking a file ends with where the file system has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

# Arrays are little-endian bytes: token ids int32, log-probs float32, versions as int32 pairs (version, tokens). Those
# of a pruned response are NULL, and so are their checksums (journal_checksums.py). So is the reward of a response that
# was not graded; its group is dropped.
_SCHEMA = """
CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY,
    issued_version INTEGER NOT NULL,
    batch_index INTEGER NOT NULL,
    prompt_id TEXT NOT NULL,
    source TEXT NOT NULL,
    prompt_token_ids BLOB NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('issued', 'collected', 'scored', 'consumed', 'dropped')),
    oldest_version INTEGER,
    newest_version INTEGER,
    consumed_step INTEGER,
    staleness INTEGER,
    group_size INTEGER,
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
"""


class JournalFile:
    """An open journal file. One thread owns the connection and works in order of call: callers never wait for the
    disk in the event loop."""

    def __init__(
        self, connection: sqlite3.Connection, thread: ThreadPoolExecutor, path: Path, may_write: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._thread = thread
        self._may_write = may_write
        self.path = path

    @classmethod
    async def open(cls, run_dir: Path, may_write: Callable[[], None] = lambda: None) -> "JournalFile":
        """The run folder's journal, made if there is none. Raises JournalError if that is not possible. `may_write` is
        called in the journal's thread before each transaction; what it raises ends that."""
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
        """Waits for what was called before it."""
        await self.run(lambda connection: connection.close())
        self._thread.shutdown()

    async def transaction(self, write: Callable[[sqlite3.Connection], Result]) -> Result:
        """What `write` returns, once its changes are committed; if it raises, nothing has changed."""

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
    """Whether the folder's file system has the POSIX locks that SQLite takes: some parallel ones, as they are mounted,
    have none. Where no file can be made to try it with, it is taken to have them."""
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
        log.warning("%s: no locks on this file system; nothing keeps a second start of the run away from it", path)
        uri += "&vfs=unix-none"  # SQLite takes no locks then; any other way every request ends with "disk I/O error"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    try:
        _make_ready(connection, path)
    except BaseException:
        connection.close()  # it holds the lock
        raise
    return connection


def _make_ready(connection: sqlite3.Connection, path: Path) -> None:
    """Settings, and the tables of a new file. Raises JournalError for a file of another format."""
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # of a new file; an older one keeps its own
    # Exclusive: WAL then needs no memory shared between processes, which network filesystems do not have.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # pruned pages go back to the disk
    connection.execute("PRAGMA journal_mode = WAL")
    # A commit survives the end of the process; after a power cut the last ones may be missing, never torn. `flush` is
    # for what must survive that too.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    found = connection.execute("PRAGMA user_version").fetchone()[0]
    if found == 0:
        connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
    elif found != SCHEMA_VERSION:
        raise JournalError(
            f"{path}: cannot be opened (it has format {found}, this version reads {SCHEMA_VERSION}; go on with the "
            "version that began the run)"
        )
