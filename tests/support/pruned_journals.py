"""Journals with groups to forget, and how many are left."""

import sqlite3

import pytest

from minpro_megatron.buffer import journal_pruning
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.records import Batch
from tests.support.journals import collect
from tests.support.rollout_fakes import (
    collected,
    issued_groups,
    with_log_probs,
)


async def fill_with_consumed(journal: Journal, num_groups: int) -> None:
    """Each group is consumed by the step of its number; all of a run's groups are long enough to have pages."""
    for index in range(num_groups):
        made = Batch(index=index, groups=[collected(group, [0] * 4_000) for group in issued_groups([index], index)])
        await collect(journal, made.groups)
        await journal.score(index, with_log_probs(made.groups))
        await journal.consume(made, [0])


async def left_to_prune(journal: Journal) -> tuple[int, int]:
    """The number of groups that have tokens, and of free pages that the file still holds."""

    def look(connection: sqlite3.Connection) -> tuple[int, int]:
        whole = "SELECT count(DISTINCT group_id) FROM responses WHERE token_ids IS NOT NULL"
        return tuple(connection.execute(query).fetchone()[0] for query in (whole, "PRAGMA freelist_count"))

    return await journal._file.run(look)


def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_pruning, "GROUPS_PER_PIECE", 1)
    monkeypatch.setattr(journal_pruning, "GROUPS_SCANNED_PER_PIECE", 3)
    monkeypatch.setattr(journal_pruning, "PAGES_PER_PIECE", 4)
