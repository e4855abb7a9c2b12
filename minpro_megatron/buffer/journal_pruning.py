"""Pruning of the journal, in pieces, so that other calls run in between: pruning gigabytes takes minutes."""

import sqlite3
from enum import Enum
from typing import NamedTuple

from minpro_megatron.buffer.journal_file import SCORES

# A piece takes tens of milliseconds of the journal's thread: four groups of 16 responses of 5,000 tokens, or 1000
# groups that are scanned, or 4 MiB of pages.
GROUPS_PER_PIECE = 4
GROUPS_SCANNED_PER_PIECE = 1000
PAGES_PER_PIECE = 256

_LOOK = (
    "SELECT group_id, (consumed_step < :before_step OR (state = 'dropped' AND newest_version < :before_step))"
    " AND EXISTS (SELECT 1 FROM responses WHERE responses.group_id = groups.group_id AND {present})"
    " FROM groups WHERE group_id > :after ORDER BY group_id LIMIT :limit"
)
_FORGET = "UPDATE responses SET {changes} WHERE group_id = ?"


class Pruned(Enum):
    """The columns of a response that are set to NULL. With EVERYTHING its scores are deleted too."""

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
        "loss_mask",
        "supports",
        "supports_checksum",
    )
    FILES = ("routes", "routes_checksum", "supports", "supports_checksum")

    @property
    def present(self) -> str:
        """The SQL condition for a response that still has the columns."""
        return "token_ids IS NOT NULL" if self is Pruned.EVERYTHING else "(routes IS NOT NULL OR supports IS NOT NULL)"


class PrunedPiece(NamedTuple):
    """`looked_at` is the last group of this piece; None if there were no more groups."""

    group_ids: list[int]
    looked_at: int | None


def prune_groups(connection: sqlite3.Connection, what: Pruned, before_step: int, after: int) -> PrunedPiece:
    """Removes the columns `what` of the first few groups with an id above `after` that are old enough. Runs inside the
    caller's transaction."""
    group_ids, looked_at = [], None
    limits = {"before_step": before_step, "after": after, "limit": GROUPS_SCANNED_PER_PIECE}
    for group_id, is_due in connection.execute(_LOOK.format(present=what.present), limits):
        looked_at = group_id
        if is_due:
            group_ids.append(group_id)
        if len(group_ids) == GROUPS_PER_PIECE:
            break
    changes = ", ".join(f"{column} = NULL" for column in what.value)
    values = [(group_id,) for group_id in group_ids]
    connection.executemany(_FORGET.format(changes=changes), values)
    for table in SCORES if what is Pruned.EVERYTHING else ():
        connection.executemany(f"DELETE FROM {table} WHERE group_id = ?", values)
    return PrunedPiece(group_ids, looked_at)


def release_free_pages(connection: sqlite3.Connection) -> bool:
    """Returns some free pages at the file's end to the disk. Returns whether there are more, including those that an
    interrupted pruning left."""
    free = _free_pages(connection)
    connection.execute(f"PRAGMA incremental_vacuum({PAGES_PER_PIECE})").fetchall()
    return 0 < _free_pages(connection) < free  # a file created without auto_vacuum keeps its free pages


def _free_pages(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA freelist_count").fetchone()[0]
