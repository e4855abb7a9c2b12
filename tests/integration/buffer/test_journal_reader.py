"""A journal is read while another process writes it, and after that process was killed."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from minpro_megatron.buffer import journal_reader
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_reader import JournalReader
from tests.support.journals import files_of

ROOT = Path(__file__).resolve().parents[3]
# A collector in a process of its own: SQLite's locks say nothing within one process.
COLLECTOR = """
import asyncio, os, sys
from pathlib import Path
from tests.support.stored_runs import write_run

async def stay(journal, run):
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await journal.flush()
    await journal.publish(1)
    print("flushed", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    os._exit(1)

write_run(Path(sys.argv[1]), while_open=stay)
"""


def test_a_run_that_goes_on_or_was_killed_is_read_and_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = subprocess.Popen(
        [sys.executable, "-c", COLLECTOR, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert collector.stdout is not None
    try:
        assert collector.stdout.readline() == b"open\n"
        before = files_of(tmp_path)
        assert before["journal.sqlite-wal"]  # nothing has been written into the file itself yet
        with JournalReader(tmp_path) as reader:
            assert reader.is_live
            assert len(list(reader.groups())) == 10
        with monkeypatch.context() as patched:
            patched.setattr(journal_reader, "MAX_SNAPSHOT_BYTES", 1000)
            with pytest.raises(JournalError, match="format 0"):
                JournalReader(tmp_path)
            assert files_of(tmp_path) == before
            assert collector.stdin is not None
            collector.stdin.write(b"\n")
            collector.stdin.flush()
            assert collector.stdout.readline() == b"flushed\n"
            with JournalReader(tmp_path) as reader:
                assert reader.is_live
                assert len(reader.rows()) == 10  # of the file alone
    finally:
        collector.communicate(b"\n", timeout=30)
    log = (tmp_path / "journal.sqlite-wal").read_bytes()
    assert log
    with JournalReader(tmp_path / "journal.sqlite") as reader:
        assert not reader.is_live
        assert len(reader.rows()) == 10
    assert (tmp_path / "journal.sqlite-wal").read_bytes() == log

    async def open_again() -> None:
        await (await Journal.open(tmp_path)).close()

    asyncio.run(open_again())  # the reader has left nothing in the way
