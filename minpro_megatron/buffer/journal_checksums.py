"""Checksums of the journal: training reads what was written, or an error reports the row that differs.

Each checksum is a CRC-32, which detects every change within 32 adjacent bits and misses one in 2**32 of all others. It
covers the row's key as well as its values, so values in the wrong row are detected too:

    groups.checksum               the whole row; written again with each change of the row
    responses.checksum            the response without its arrays, with its turns; stays after the arrays are pruned
    responses.arrays_checksum     token ids, rollout log-probs, versions and loss mask
    behavior_scores.checksum      behavior log-probs; trained_scores.checksum likewise
    responses.routes_checksum     the location of the routes; supports_checksum likewise
    beginnings.checksum           the whole row

The tables `versions` and `evaluations` have none, because training does not read them. Checksums take a tenth of the
journal's CPU time (benchmarks/collector_load.md).
"""

import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

_GROUP = (
    "group_id", "issued_version", "batch_index", "prompt_id", "source", "prompt_token_ids", "state", "oldest_version",
    "newest_version", "consumed_step", "staleness", "group_size", "trained",
)  # fmt: skip
GROUP_COLUMNS = ", ".join(_GROUP)


class ResponseRow(NamedTuple):
    """A row of `responses` with its scores, as SQLite returns it. Journals of formats below 8 have the scores and their
    checksums in columns of `responses`, which are NULL for responses that were scored since."""

    group_id: int
    place: int
    sampling_seed: int
    num_tokens: int
    token_ids: bytes | None
    rollout_log_probs: bytes | None
    policy_versions: bytes | None
    finish_reason: str
    reward: float | None
    behavior_log_probs: bytes | None
    trained_log_probs: bytes | None
    routes: str | None
    checksum: int
    arrays_checksum: int | None
    behavior_checksum: int | None
    trained_checksum: int | None
    routes_checksum: int | None
    loss_mask: bytes | None
    turns: str | None
    supports: str | None
    supports_checksum: int | None


RESPONSE_COLUMNS = ", ".join(ResponseRow._fields)
_OF_SCORES = {
    "behavior_log_probs": "coalesce(behavior.log_probs, behavior_log_probs)",
    "trained_log_probs": "coalesce(trained.log_probs, trained_log_probs)",
    "behavior_checksum": "coalesce(behavior.checksum, behavior_checksum)",
    "trained_checksum": "coalesce(trained.checksum, trained_checksum)",
}
_RESPONSES = f"""
SELECT {", ".join(_OF_SCORES.get(name, f"responses.{name}") for name in ResponseRow._fields)} FROM responses
    LEFT JOIN behavior_scores AS behavior USING (group_id, place)
    LEFT JOIN trained_scores AS trained USING (group_id, place)
WHERE responses.group_id = ? ORDER BY responses.place
"""


class Damage(NamedTuple):
    """The part of a group, or of its response `place`, that differs from what was recorded."""

    group_id: int
    place: int | None
    what: str

    def __str__(self) -> str:
        where = f"group {self.group_id}" if self.place is None else f"group {self.group_id}, response {self.place}"
        return f"{where}: {self.what}"


def checksum(*values: int | float | str | bytes | None) -> int:
    """CRC-32 of the values. Floats count as SQLite returns them, without the sign of a zero. In a damaged row a column
    may have a value of any type."""
    crc = 0
    for value in values:
        if isinstance(value, bytes):
            crc = zlib.crc32(value, zlib.crc32(f"{len(value)} bytes".encode(), crc))
        else:
            plain = value + 0.0 if isinstance(value, float) else value
            crc = zlib.crc32(f"{plain!r};".encode(), crc)
    return crc


def group_checksum(values: Sequence) -> int:
    """groups.checksum, of the values of GROUP_COLUMNS. Without `trained` it is that of journals of formats below 8."""
    return checksum(*(values if values[-1] is not None else values[:-1]))


def response_checksum(
    group_id: int,
    place: int,
    sampling_seed: int,
    num_tokens: int,
    finish_reason: str,
    reward: float | None,
    turns: str | None = None,
) -> int:
    """responses.checksum. Without turns it is that of journals from before there were episodes."""
    values = group_id, place, sampling_seed, num_tokens, finish_reason, reward
    return checksum(*values) if turns is None else checksum(*values, turns)


def arrays_checksum(
    group_id: int, place: int, arrays: Sequence[bytes | None], loss_mask: bytes | None = None
) -> int | None:
    """responses.arrays_checksum. Without a loss mask it is that of journals from before there were episodes."""
    return part_checksum(group_id, place, "arrays", *arrays, *([] if loss_mask is None else [loss_mask]))


def part_checksum(group_id: int, place: int, part: str, *values: bytes | str | None) -> int | None:
    """The checksum of columns of a response that are either all present or all missing; `part` names them."""
    return None if values[0] is None else checksum(group_id, place, part, *values)


def seal_groups(connection: sqlite3.Connection, condition: str = "1", values: Iterable[tuple] = ((),)) -> None:
    """Writes the checksums of the groups that fulfil the SQL condition, once for each item of `values`. Part of every
    transaction that changes groups."""
    query = f"SELECT {GROUP_COLUMNS} FROM groups WHERE {condition}"
    rows = [row for one in values for row in connection.execute(query, one)]
    sealed = [(group_checksum(row), row[0]) for row in rows]
    connection.executemany("UPDATE groups SET checksum = ? WHERE group_id = ?", sealed)


def seal_group_ids(connection: sqlite3.Connection, group_ids: Iterable[int]) -> None:
    """`seal_groups` for these groups."""
    seal_groups(connection, "group_id = ?", [(group_id,) for group_id in group_ids])


def damaged_group_rows(connection: sqlite3.Connection) -> Iterator[Damage]:
    """The groups whose rows differ from what was recorded."""
    for row in connection.execute(f"SELECT {GROUP_COLUMNS}, checksum FROM groups"):
        if damage := group_damage(row):
            yield damage


def group_damage(row: tuple) -> Damage | None:
    """The damage if the values of GROUP_COLUMNS differ from the checksum after them, else None. Pass the same row that
    is used: a damaged page may hold a group twice, and another query may find the other row."""
    *values, recorded = row
    if group_checksum(values) == recorded:
        return None
    return Damage(row[0], None, "its prompt, state, versions or global step differ from their checksum")


def response_rows(connection: sqlite3.Connection, group_id: int) -> list[ResponseRow]:
    """The responses of a group, in order."""
    return [ResponseRow(*row) for row in connection.execute(_RESPONSES, (group_id,))]


def responses_of(
    connection: sqlite3.Connection,
    group_id: int,
    size: int | None,
    state: str,
    trained: int | None,
    *,
    with_trained: bool,
) -> tuple[list[ResponseRow], Damage | None]:
    """The responses of a group of `size` responses, in order, and the first damage found in them. `state` and `trained`
    are those of the group's row. `with_trained` also checks their log-probs at the update."""
    rows = response_rows(connection, group_id)
    expected = list(range(size or 0))
    if [row.place for row in rows] != expected:
        found = ", ".join(str(row.place) for row in rows) or "none"
        return rows, Damage(group_id, None, f"it should have responses 0 to {len(expected) - 1}, but has {found}")
    for row in rows:
        what = _damage(row if with_trained else row._replace(trained_log_probs=None, trained_checksum=None))
        what = what or _lack(row, state in ("scored", "consumed"), with_trained and bool(trained))
        if what:
            return rows, Damage(group_id, row.place, what)
    return rows, None


def _lack(row: ResponseRow, is_scored: bool, is_trained: bool) -> str:
    """The scores that the response should have, unless it is pruned; "" if none are missing."""
    if row.token_ids is None:
        return ""
    if is_scored and row.behavior_log_probs is None:
        return "the responses of its group are scored, but it has no behavior log-probs"
    if is_trained and row.trained_log_probs is None:
        return "the responses of its group are trained on, but it has no log-probs of the update"
    return ""


def _damage(row: ResponseRow) -> str:
    """The part of the response that differs from what was recorded; "" if there is none."""
    key = row.group_id, row.place
    scalars = row.sampling_seed, row.num_tokens, row.finish_reason, row.reward
    if response_checksum(*key, *scalars, row.turns) != row.checksum:
        return "its seed, length, stop reason, reward or turns differ from their checksum"
    arrays = row.token_ids, row.rollout_log_probs, row.policy_versions
    if arrays_checksum(*key, arrays, row.loss_mask) != row.arrays_checksum:
        return "its tokens, rollout log-probs, versions or loss mask differ from their checksum"
    if part_checksum(*key, "behavior", row.behavior_log_probs) != row.behavior_checksum:
        return "its behavior log-probs differ from their checksum"
    if part_checksum(*key, "trained", row.trained_log_probs) != row.trained_checksum:
        return "its log-probs at the update differ from their checksum"
    if part_checksum(*key, "routes", row.routes) != row.routes_checksum:
        return "the location of its routes differs from its checksum"
    if part_checksum(*key, "supports", row.supports) != row.supports_checksum:
        return "the location of its kept ids differs from its checksum"
    return _disagreement(row)


def _disagreement(row: ResponseRow) -> str:
    """A fault that was recorded with the response; "" if it can be trained on."""
    names = ("token_ids", "rollout_log_probs", "behavior_log_probs", "trained_log_probs")
    for name in names:
        data = getattr(row, name)
        if data is not None and len(data) != 4 * row.num_tokens:
            return f"{name} has {len(data) / 4:g} values for {row.num_tokens} tokens"
    if row.token_ids is None or row.policy_versions is None:
        return ""
    sampled = np.ones(row.num_tokens, bool)
    if row.loss_mask is not None:
        mask = np.frombuffer(row.loss_mask, np.uint8)
        if len(mask) != row.num_tokens or mask.max(initial=0) > 1 or not (mask[:1].all() and mask[-1:].all()):
            return f"its loss mask is not one of {row.num_tokens} tokens of which the first and the last are sampled"
        sampled = mask > 0
    lengths = np.frombuffer(row.policy_versions, "<i4").reshape(-1, 2)[:, 1]
    if (lengths < 1).any() or lengths.sum() != row.num_tokens:
        return f"its versions cover {lengths.sum()} tokens, but it has {row.num_tokens}"
    if np.frombuffer(row.token_ids, "<i4").min(initial=0) < 0:
        return "a token id is negative"
    for name in ("rollout_log_probs", "behavior_log_probs"):
        data = getattr(row, name)
        if data is not None and not np.isfinite(np.frombuffer(data, "<f4")[sampled]).all():
            return f"{name} has a value that is not finite"
    return ""
