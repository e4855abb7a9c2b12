"""A pruning of the journal that is cut short while it runs."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.route_files import RouteFiles
from tests.support.pruned_journals import fill_with_consumed, left_to_prune, small_pieces


def test_a_pruning_that_is_cut_short_is_ended_by_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`close` cuts it while tokens are forgotten, then while pages are given back; the one after goes to its end."""
    small_pieces(monkeypatch)
    left = []

    def first_is_slow(files: RouteFiles, group_ids: list[int]) -> None:
        time.sleep(0 if left else 0.1)  # `close` waits for it: nobody would remove the files later

    monkeypatch.setattr(RouteFiles, "remove", first_is_slow)

    async def cut_where(journal: Journal, reached: Callable[[int, int], bool]) -> None:
        pruning = asyncio.create_task(journal.prune(8))
        await asyncio.sleep(0)
        while not reached(*await left_to_prune(journal)):
            await asyncio.sleep(0)
        await journal.close()
        assert pruning.done()

    async def main() -> None:
        journal = await Journal.open(tmp_path)
        await fill_with_consumed(journal, 9)
        await cut_where(journal, lambda groups, pages: groups < 8)
        for reached in (lambda groups, pages: groups == 1, lambda groups, pages: True):
            journal = await Journal.open(tmp_path)
            left.append(await left_to_prune(journal))
            await cut_where(journal, reached)
        journal = await Journal.open(tmp_path)
        await journal.prune(8)
        left.append(await left_to_prune(journal))
        groups, next_group = await journal.restore(8, 1, True)
        assert ([group.group_id for group in groups], next_group) == ([8], 9)
        await journal.close()

    asyncio.run(main())
    (groups_of_first, _), (groups_of_second, pages), last = left
    assert 1 < groups_of_first < 8
    assert groups_of_second == 1
    assert pages > 0
    assert last == (1, 0)
