"""A journal whose file is in memory, and groups that are small enough to go through it by the thousand."""

import asyncio
import sqlite3
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_file import _SCHEMA, JournalFile
from minpro_megatron.buffer.route_files import RouteFiles
from minpro_megatron.buffer.schedule import Slot
from minpro_megatron.records import CollectedGroup, IssuedGroup, Prompt, Response

PROMPT = Prompt(id="p", source="test", text="1=", answer="1")
TOKEN_IDS = np.asarray([3, 4], dtype=np.int32)
LOG_PROBS = np.asarray([-1.0, -0.5], dtype=np.float32)


class InMemoryFile(JournalFile):
    """The journal's tables in memory; its transactions are those of the real file."""

    def __init__(self) -> None:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        connection.executescript(_SCHEMA)
        connection.execute("PRAGMA foreign_keys = ON")
        super().__init__(connection, Inline(1), Path(":memory:"), may_write=lambda: None)

    async def run(self, work):
        return work(self._connection)

    def copy(self) -> bytes:
        return self._connection.serialize()

    def put_back(self, copy: bytes) -> None:
        self._connection.deserialize(copy)
        self._connection.execute("PRAGMA foreign_keys = ON")

    def rows(self, query: str) -> list[tuple]:
        return self._connection.execute(query).fetchall()


class Inline(ThreadPoolExecutor):
    """Runs at once, in the caller's thread: nothing here waits for a disk."""

    def submit(self, fn, /, *args, **kwargs):
        done = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def issued_group(slot: Slot) -> IssuedGroup:
    return IssuedGroup(
        group_id=slot.group_id,
        batch_index=slot.batch_index,
        policy_version=slot.version,
        prompt=PROMPT,
        prompt_token_ids=TOKEN_IDS,
        sampling_seeds=[slot.group_id],
    )


def sampled(slot: Slot, first_version: int, last_version: int) -> CollectedGroup:
    response = Response(
        token_ids=TOKEN_IDS,
        rollout_log_probs=LOG_PROBS,
        policy_versions=np.asarray([first_version, last_version], dtype=np.int32),
        finish_reason="stop",
        reward=1.0,
    )
    return CollectedGroup(issued=issued_group(slot), responses=[response])


def with_scores(group: CollectedGroup) -> CollectedGroup:
    responses = [msgspec.structs.replace(response, behavior_log_probs=LOG_PROBS) for response in group.responses]
    return CollectedGroup(issued=group.issued, responses=responses)


def in_memory(
    use: Callable[[Journal, InMemoryFile], Coroutine[None, None, None]], folder: Path = Path("unused")
) -> None:
    file = InMemoryFile()
    with closing(file._connection):
        asyncio.run(use(Journal(file, RouteFiles(folder)), file))
