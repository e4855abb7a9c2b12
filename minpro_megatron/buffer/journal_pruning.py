"""A journal's pruning, in pieces between which its other users get their turn: gigabytes take minutes."""

import sqlite3
from enum import Enum
from typing import NamedTuple

# A piece is tens of milliseconds of the journal's one thread: four groups of 16 responses of 5,000 tokens, 1000 groups
# that are looked at, 4 MiB of pages.
GROUPS_PRUNED = 4
GROUPS_LOOKED_AT = 1000
PAGES_GIVEN_BACK = 256

_LOOK = (
    "SELECT group_id, (consumed_step < :before_step OR (state = 'dropped' AND newest_version < :before_step))"
    " AND EXISTS (SELECT 1 FROM responses WHERE responses.group_id = groups.group_id AND {first} IS NOT NULL)"
    " FROM groups WHERE group_id > :after ORDER BY group_id LIMIT :limit"
)
_FORGET = "UPDATE responses SET {changes} WHERE group_id = ?"


class Pruned(Enum):
    """What is forgotten of a response: columns, of which the first says whether the rest is still there."""

    EVERYTHING = (
        "token_ids",
        "rollout_log_probs",
        "policy_versions",
        "behavior_log_probs",
        "trained_log_probs",
        "routes",
        "arrays_checksum",
        "behavior_checksum",
        "trained_checksum",
        "routes_checksum",
    )
    ROUTES = ("routes", "routes_checksum")


class PrunedPiece(NamedTuple):
    """`looked_at`: the last group of this piece; None if there were no more."""

    group_ids: list[int]
    looked_at: int | None


def prune_groups(connection: sqlite3.Connection, what: Pruned, before_step: int, after: int) -> PrunedPiece:
    """Forgets `what` of the first few groups with an id above `after` that are old enough, inside the caller's
    transaction."""
    group_ids, looked_at = [], None
    values = {"before_step": before_step, "after": after, "limit": GROUPS_LOOKED_AT}
    for group_id, is_due in connection.execute(_LOOK.format(first=what.value[0]), values):
        looked_at = group_id
        if is_due:
            group_ids.append(group_id)
        if len(group_ids) == GROUPS_PRUNED:
            break
    changes = ", ".join(f"{column} = NULL" for column in what.value)
    connection.executemany(_FORGET.format(changes=changes), [(group_id,) for group_id in group_ids])
    return PrunedPiece(group_ids, looked_at)


def give_pages_back(connection: sqlite3.Connection) -> bool:
    """Gives some free pages at the file's end back to the disk. Returns whether there are more, those included that an
    interrupted pruning has left."""
    free = _free_pages(connection)
    connection.execute(f"PRAGMA incremental_vacuum({PAGES_GIVEN_BACK})").fetchall()
    return 0 < _free_pages(connection) < free  # a file that was made without auto_vacuum keeps them


def _free_pages(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA freelist_count").fetchone()[0]
