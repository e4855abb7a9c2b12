"""The journal on a file system without POSIX locks."""

from pathlib import Path

from tests.support.no_locks import run_without_locks

PROGRAM = """
import asyncio, os, sqlite3, sys
from contextlib import closing
from pathlib import Path

from minpro_megatron.launch.resume import holds_a_run
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_reader import JournalReader
from tests.support.rollout_fakes import issued_groups

folder = Path(sys.argv[1])
with closing(sqlite3.connect(folder / "probe.sqlite", isolation_level=None)) as plain:
    try:
        plain.execute("CREATE TABLE t (a)")
    except sqlite3.OperationalError as error:
        print("plain SQLite:", error, flush=True)

async def collect(run_dir, crashes):
    journal = await Journal.open(run_dir)
    print("empty:", holds_a_run(run_dir), flush=True)
    await journal.issue(issued_groups([0, 1]))
    with JournalReader(run_dir) as reader:
        print("during the run:", len(reader.rows()), flush=True)
    if not crashes:
        await journal.close()
    os._exit(0)

for run_dir in (folder / "closed", folder / "crashed"):
    if os.fork() == 0:
        asyncio.run(collect(run_dir, run_dir.name == "crashed"))
    os.wait()
    with JournalReader(run_dir) as reader:
        print(f"{run_dir.name}:", holds_a_run(run_dir), len(reader.rows()), flush=True)
"""


def test_a_journal_is_written_and_read_where_nothing_can_be_locked(tmp_path: Path) -> None:
    ended = run_without_locks(tmp_path, PROGRAM, str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    begun = ["empty: False", "during the run: 2"]
    assert ended.stdout.splitlines() == [
        "plain SQLite: disk I/O error", *begun, "closed: True 2", *begun, "crashed: True 2"
    ]  # fmt: skip
    assert ended.stderr.count("nothing keeps a second start of the run from opening it") == 2
