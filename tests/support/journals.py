"""A journal that is opened in a run folder, used and closed."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.records import CollectedGroup


def in_journal(run_dir: Path, use: Callable[[Journal], Awaitable[None]]) -> None:
    async def main() -> None:
        journal = await Journal.open(run_dir)
        try:
            await use(journal)
        finally:
            await journal.close()

    asyncio.run(main())


async def nothing(journal: Journal) -> None:
    pass


async def collect(journal: Journal, groups: list[CollectedGroup]) -> None:
    await journal.issue([group.issued for group in groups])
    for group in groups:
        await journal.collect(group, accepted=True)


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file directly in the folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
