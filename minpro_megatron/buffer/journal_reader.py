"""Reads a run's journal without changing it, for tools and for training again on its rollouts."""

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minpro_megatron.buffer.journal_checksums import GROUP_COLUMNS, Damage, group_damage, responses_of
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_file import FILE_NAME, MISSING_COLUMNS, SCHEMA_VERSION, SCORES, has_locks
from minpro_megatron.buffer.journal_rows import loss_mask_of, turns_of
from minpro_megatron.buffer.route_files import RouteFiles
from minpro_megatron.errors import UserError
from minpro_megatron.records import EvaluationResult, StoredArray, Turn

MAX_SNAPSHOT_BYTES = 2 << 30
_SNAPSHOT_ATTEMPTS = 5
_WAL_HEADER_BYTES = 32  # contains two numbers that change whenever the log is restarted


class NoJournal(JournalError, UserError):
    """There is no journal at the given path."""


class StoredResponse(NamedTuple):
    """A response as stored in the journal. Arrays have a value per token, and are None if pruned or not yet known."""

    place: int
    sampling_seed: int
    num_tokens: int
    finish_reason: str
    reward: float | None  # None: it could not be graded, and the group was dropped
    token_ids: np.ndarray | None  # int32
    policy_versions: np.ndarray | None  # int32; NOT_SAMPLED for given tokens
    rollout_log_probs: np.ndarray | None  # float32
    behavior_log_probs: np.ndarray | None  # float32, once scored
    trained_log_probs: np.ndarray | None  # float32, of the policy at the update that trained on it, once consumed
    routes: str | None  # the location of its routes in the run's route files; None: none were kept
    loss_mask: np.ndarray | None  # uint8: 1 for sampled tokens, 0 for given ones; None: all are sampled
    turns: list[Turn]  # of an episode
    supports: str | None  # as routes: the location of what truncated sampling kept

    @property
    def num_given(self) -> int:
        return 0 if self.loss_mask is None else int(np.count_nonzero(self.loss_mask == 0))

    @property
    def ratios(self) -> np.ndarray | None:
        """Importance ratios at the update that trained on the response, float32; NaN where no update did."""
        if self.trained_log_probs is None or self.behavior_log_probs is None:
            return None
        return np.exp(self.trained_log_probs - self.behavior_log_probs)


class StoredGroup(NamedTuple):
    """A group as stored in the journal; `responses` is empty before it is collected."""

    group_id: int
    issued_version: int
    batch_index: int
    prompt_id: str
    source: str
    prompt_token_ids: np.ndarray  # int32
    state: str
    oldest_version: int | None
    newest_version: int | None
    consumed_step: int | None
    staleness: int | None
    responses: list[StoredResponse]

    @property
    def mean_reward(self) -> float | None:
        """The mean over the graded responses; None if none was graded."""
        rewards = [response.reward for response in self.responses if response.reward is not None]
        return float(np.mean(rewards)) if rewards else None


class GroupRow(NamedTuple):
    """A group without its tokens; values that are not known yet are None."""

    group_id: int
    state: str
    consumed_step: int | None
    batch_index: int
    prompt_id: str
    issued_version: int
    oldest_version: int | None
    newest_version: int | None
    staleness: int | None
    num_responses: int
    num_tokens: int  # of its responses
    mean_reward: float | None  # of the graded ones


class StoredStep(NamedTuple):
    """What a global step consumed."""

    step: int
    num_groups: int
    smallest_group: int  # responses
    largest_group: int
    longest_prompt: int  # tokens
    longest_response: int
    num_responses: int
    num_whole: int  # responses that have tokens and behavior log-probs: neither pruned nor unscored
    num_routes: int  # responses that have routes
    num_supports: int  # responses that have supports
    smallest_staleness: int
    largest_staleness: int


# GroupRow's columns, for conditions as for the result.
_ROWS = f"""
SELECT {", ".join(GroupRow._fields)} FROM (
    SELECT groups.*, count(place) AS num_responses, coalesce(sum(num_tokens), 0) AS num_tokens,
        avg(reward) AS mean_reward
    FROM groups LEFT JOIN responses USING (group_id) GROUP BY groups.group_id
) WHERE {{condition}} ORDER BY group_id LIMIT ?
"""
_STEPS = """
SELECT consumed_step, count(*), min(num_responses), max(num_responses), max(length(prompt_token_ids)) / 4,
    max(longest), sum(num_responses), sum(num_whole), sum(num_routes), sum(num_supports),
    min(staleness), max(staleness)
FROM groups JOIN (
    SELECT group_id, count(*) AS num_responses, max(num_tokens) AS longest, count(routes) AS num_routes,
        count(supports) AS num_supports,
        sum(token_ids IS NOT NULL AND (behavior_log_probs IS NOT NULL OR behavior_scores.checksum IS NOT NULL))
            AS num_whole
    FROM responses LEFT JOIN behavior_scores USING (group_id, place) GROUP BY group_id
) USING (group_id) WHERE state = 'consumed' GROUP BY consumed_step ORDER BY consumed_step
"""


class JournalReader:
    """A journal opened for reading; use inside `with`. Raises NoJournal if there is none, and JournalError if it has
    another format or the data read is damaged.

    While the run is active (`is_live`; also assumed on a file system without locks, where it cannot be checked), its
    collector has the journal locked. Then a copy is read, which has the state at the time of opening. Above
    MAX_SNAPSHOT_BYTES the file itself is read instead; it lacks the last few transactions and may change meanwhile.
    """

    def __init__(self, path: Path) -> None:
        path = Path(path)
        self.path = path / FILE_NAME if path.is_dir() else path
        if not self.path.is_file():
            raise NoJournal(f"{self.path}: there is no such file; give a run folder or its {FILE_NAME}")
        self._log = self.path.with_name(f"{self.path.name}-wal")
        self._stack = ExitStack()
        self.is_live = False
        self._may_change = False  # while it is read
        self._connection = self._open()
        try:
            with self._reading():
                found = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if found in MISSING_COLUMNS:
                self._add_columns(MISSING_COLUMNS[found])
            elif found != SCHEMA_VERSION:
                raise JournalError(f"{self.path}: format {found}; this version reads {SCHEMA_VERSION}")
        except JournalError:
            self._stack.close()
            raise

    def _open(self) -> sqlite3.Connection:
        if not self._log.exists():  # closed in order, so no process has it open: SQLite needs no lock and no other file
            return self._connect(self.path, "mode=ro&immutable=1")
        self.is_live = not has_locks(self.path.parent)  # without locks this cannot be checked
        if not self.is_live:
            connection = self._connect(self.path, "mode=ro")
            try:
                connection.execute("PRAGMA user_version").fetchone()
                return connection
            except (sqlite3.Error, UnicodeDecodeError) as error:
                self.is_live = "locked" in str(error)
            if not self.is_live:
                return connection  # damaged: the next request reports it
        if self.path.stat().st_size + self._log.stat().st_size > MAX_SNAPSHOT_BYTES:
            self._may_change = True
            return self._connect(self.path, "mode=ro&immutable=1")
        connection = self._connect(self._snapshot(), "mode=rw&vfs=unix-none")  # the copy is private: no locks needed
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")  # and no shared memory for its log
        return connection

    def _connect(self, path: Path, options: str) -> sqlite3.Connection:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?{options}", uri=True, timeout=0.1)
        self._stack.callback(connection.close)
        return connection

    def _snapshot(self) -> Path:
        """A copy of the file and its log. The log only grows, so it fits the file as long as it was not written into
        the file and restarted meanwhile."""
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="journal-")))
        copy = folder / FILE_NAME
        for _ in range(_SNAPSHOT_ATTEMPTS):
            before = self._file_state()
            shutil.copyfile(self.path, copy)
            shutil.copyfile(self._log, folder / f"{FILE_NAME}-wal")
            if self._file_state() == before:
                return copy
        raise JournalError(f"{self.path}: the run keeps writing to it; try again in a moment")

    def _add_columns(self, columns: Sequence[str]) -> None:
        """Makes a journal of an earlier format look like a current one. A view of this connection hides the table, so
        the file does not change."""
        missing = "".join(f", NULL AS {column.split()[0]}" for column in columns)
        self._connection.execute(f"CREATE TEMP VIEW responses AS SELECT *{missing} FROM main.responses")
        self._connection.execute("CREATE TEMP VIEW groups AS SELECT *, NULL AS trained FROM main.groups")
        for table in SCORES:
            empty = "SELECT NULL AS group_id, NULL AS place, NULL AS log_probs, NULL AS checksum WHERE 0"
            self._connection.execute(f"CREATE TEMP VIEW {table} AS {empty}")

    def _file_state(self) -> tuple[int, int, bytes]:
        status = self.path.stat()
        with self._log.open("rb") as log:
            return status.st_mtime_ns, status.st_size, log.read(_WAL_HEADER_BYTES)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError) as error:  # ValueError: bytes that are not an array
            raise JournalError(f"{self.path}: it cannot be read, or is damaged ({error})") from None

    def __enter__(self) -> "JournalReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def rows(self, condition: str = "1", values: tuple[object, ...] = (), limit: int = -1) -> list[GroupRow]:
        """The groups whose row fulfils `condition` (SQL over GroupRow's fields with `?` for `values`), in order of id;
        at most `limit` of them if that is not negative."""
        with self._reading():
            found = self._connection.execute(_ROWS.format(condition=condition), (*values, limit)).fetchall()
        return [GroupRow(*row) for row in found]

    def groups(self, condition: str = "1", values: tuple[object, ...] = ()) -> Iterator[StoredGroup]:
        """The groups that fulfil `condition` (SQL over StoredGroup's fields except `responses`), in order of id. Raises
        JournalError at a group that differs from what was recorded."""
        query = f"SELECT {GROUP_COLUMNS}, checksum FROM groups WHERE {condition} ORDER BY group_id"
        with self._reading():
            rows = self._connection.execute(query, values).fetchall()
        for row in rows:
            with self._reading():
                if damage := group_damage(row):
                    raise self._damaged(damage)
                *recorded, size, trained, _ = row
                fields: dict[str, Any] = dict(
                    zip(StoredGroup._fields[:-1], recorded, strict=True)
                )  # the columns' order
                fields["prompt_token_ids"] = _array(fields["prompt_token_ids"], "<i4")
                responses = self._responses(fields["group_id"], size, fields["state"], trained)
                group = StoredGroup(**fields, responses=responses)
            yield group

    def steps(self) -> dict[int, StoredStep]:
        """What each global step consumed, by step."""
        with self._reading():
            return {row[0]: StoredStep(*row) for row in self._connection.execute(_STEPS)}

    def evaluations(self) -> list[EvaluationResult]:
        names = EvaluationResult.__struct_fields__
        with self._reading():
            rows = self._connection.execute(
                f"SELECT {', '.join(names)} FROM evaluations ORDER BY policy_version, benchmark"
            )
            return [EvaluationResult(**dict(zip(names, row, strict=True))) for row in rows]

    def stored_routes(self, group_id: int, response: StoredResponse) -> StoredArray | None:
        """The location of the experts that the server chose; None if none were kept. Raises JournalError if the run's
        route file is missing or damaged."""
        with self._reading():
            return RouteFiles(self.path.parent).verified(group_id, response.routes)

    def stored_supports(self, group_id: int, response: StoredResponse) -> StoredArray | None:
        """As stored_routes, of what truncated sampling kept."""
        with self._reading():
            return RouteFiles(self.path.parent).verified(group_id, response.supports, "kept ids")

    def _responses(self, group_id: int, size: int | None, state: str, trained: int | None) -> list[StoredResponse]:
        rows, damage = responses_of(self._connection, group_id, size, state, trained, with_trained=True)
        if damage is not None:
            raise self._damaged(damage)
        found = []
        for row in rows:
            fields: dict[str, Any] = {name: getattr(row, name) for name in StoredResponse._fields}
            fields["token_ids"] = _array(fields["token_ids"], "<i4")
            for name in ("rollout_log_probs", "behavior_log_probs", "trained_log_probs"):
                fields[name] = _array(fields[name], "<f4")
            spans = _array(fields["policy_versions"], "<i4")
            if spans is not None:
                versions, lengths = spans.reshape(-1, 2).T
                fields["policy_versions"] = np.repeat(versions, lengths)
            fields["loss_mask"], fields["turns"] = loss_mask_of(row.loss_mask), turns_of(row.turns)
            found.append(StoredResponse(**fields))
        return found

    def _damaged(self, damage: Damage) -> JournalError:
        changing = ", or its run has changed it meanwhile: try again" if self._may_change else ""
        return JournalError(f"{self.path}: {damage}; the file is damaged: give an undamaged copy of it{changing}")


def _array(data: bytes | None, dtype: str) -> np.ndarray | None:
    return None if data is None else np.frombuffer(data, dtype=dtype)
