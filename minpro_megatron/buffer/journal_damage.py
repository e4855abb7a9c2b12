"""Handling of damaged rows when a journal is rolled back to a checkpoint: they are sampled again where possible.

Bounded mode can sample any group again, with the current weights. In delay mode a group belongs to the version at which
it was issued, so only groups of the checkpoint's version can be sampled again, and that version must be known. A group
whose own row is damaged is therefore needed unless it was consumed before the checkpoint or issued after it.
"""

import sqlite3
from collections.abc import Iterable, Iterator

from minpro_megatron.buffer.journal_checksums import Damage, checksum, damaged_group_rows, responses_of
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_file import SCORES

_NEEDED = (
    "the run needs it and cannot sample it again: restore a copy of the journal that belongs to the checkpoint, resume "
    "from an earlier checkpoint (write its name into checkpoints/latest), or give a new name=..."
)
_AGAIN = "it is sampled again"


def refuse_needed_rows(connection: sqlite3.Connection, version: int, num_prompts: int, delay_mode: bool) -> list[str]:
    """Deletes the groups that were issued after `version` and checks the rows of the others. Returns a line for each
    damaged row that is not needed; the unconsumed ones among them are sampled again. Raises JournalError for a damaged
    row that is needed."""
    for *beginning, recorded in connection.execute("SELECT first_batch, version, checksum FROM beginnings"):
        if delay_mode and checksum(*beginning) != recorded:
            raise JournalError(
                f"the row of beginnings for an extension of the run differs from its checksum; {_NEEDED}"
            )
    damaged = {one.group_id: one for one in damaged_group_rows(connection)}
    consumed = _consumed(connection, version, num_prompts, damaged)
    forgotten = _issued_later(connection, version, delay_mode, damaged, consumed)
    connection.executemany("DELETE FROM groups WHERE group_id = ?", [(group_id,) for group_id in forgotten])
    repeated = damaged.keys() - consumed - forgotten
    for group_id in sorted(repeated) if delay_mode else ():
        raise JournalError(f"{damaged[group_id]}; {_NEEDED}")
    connection.executemany(
        "UPDATE groups SET state = 'consumed' WHERE group_id = ?", [(group_id,) for group_id in consumed]
    )
    discard_responses(connection, repeated)
    connection.executemany(
        "UPDATE groups SET prompt_id = '', issued_version = ?, batch_index = -1, consumed_step = NULL, staleness = NULL"
        " WHERE group_id = ?",
        [(version, group_id) for group_id in repeated],
    )
    kept = "it was consumed before the checkpoint, so it is not needed"
    return [f"{one}; {kept if group_id in consumed else _AGAIN}" for group_id, one in damaged.items()]


def _consumed(connection: sqlite3.Connection, version: int, num_prompts: int, damaged: dict[int, Damage]) -> set[int]:
    """The damaged groups that a step before `version` has consumed: those whose row names such a step, if that step
    lacks groups without them."""
    by_step: dict[int, list[int]] = {}
    query = "SELECT consumed_step, group_id FROM groups WHERE consumed_step < ?"
    for step, group_id in connection.execute(query, (version,)):
        by_step.setdefault(step, []).append(group_id)
    whole = (group_ids for group_ids in by_step.values() if len(group_ids) <= num_prompts)
    return {group_id for group_ids in whole for group_id in group_ids} & damaged.keys()


def _issued_later(
    connection: sqlite3.Connection, version: int, delay_mode: bool, damaged: dict[int, Damage], consumed: set[int]
) -> set[int]:
    """The groups that were issued after `version`. Ids are issued in order, so the intact rows decide this for damaged
    ones. Below the last intact id that stays, only an earlier restore can have issued a group again."""
    rows = connection.execute("SELECT group_id, issued_version FROM groups ORDER BY group_id").fetchall()
    # a damaged value may be of any type
    rows = [(group_id, issued if isinstance(issued, int) else -1) for group_id, issued in rows]
    intact = [(group_id, issued) for group_id, issued in rows if group_id not in damaged]
    last = max((group_id for group_id, issued in intact if issued <= version), default=-1)
    first_later = min((group_id for group_id, _ in intact if group_id > last), default=float("inf"))
    return {
        group_id
        for group_id, issued in rows
        if group_id > last
        and group_id not in consumed
        and (issued > version or group_id > first_later or not delay_mode)
    }


def discard_damaged_responses(connection: sqlite3.Connection, version: int, delay_mode: bool) -> list[str]:
    """Discards the responses of damaged groups that are ready. Returns a line for each such group. Raises JournalError
    for a group that cannot be sampled again."""
    found = list(_damaged_responses(connection))
    for damage, issued_version in found:
        if delay_mode and issued_version < version:
            raise JournalError(f"{damage}; {_NEEDED}")
    discard_responses(connection, (damage.group_id for damage, _ in found))
    return [f"{damage}; {_AGAIN}" for damage, _ in found]


def _damaged_responses(connection: sqlite3.Connection) -> Iterator[tuple[Damage, int]]:
    ready = connection.execute(
        "SELECT group_id, issued_version, state, group_size FROM groups WHERE consumed_step IS NULL"
        " AND state IN ('collected', 'scored') ORDER BY group_id"
    ).fetchall()
    for group_id, issued_version, state, size in ready:
        _, damage = responses_of(connection, group_id, size, state, None, with_trained=False)
        if damage is not None:
            yield damage, issued_version


def discard_responses(connection: sqlite3.Connection, group_ids: Iterable[int]) -> None:
    """Deletes the groups' responses, so that the groups are sampled again."""
    values = [(group_id,) for group_id in group_ids]
    for table in ("responses", *SCORES):
        connection.executemany(f"DELETE FROM {table} WHERE group_id = ?", values)
    connection.executemany(
        "UPDATE groups SET state = 'issued', oldest_version = NULL, newest_version = NULL, group_size = NULL,"
        " trained = NULL WHERE group_id = ?",
        values,
    )
