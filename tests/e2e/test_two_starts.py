"""Two launches of one run at once, where no lock works: the real roles of the older one leave the run to the newer."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from minpro_megatron.checkpoints.resume_point import read_latest
from tests.e2e.conftest import SMALL_RUN, Launcher
from tests.support.no_locks import library_without_locks

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(480)]

STEPS = 40


def test_the_newer_of_two_launches_finishes_the_run_alone(
    launches: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import fcntl\nfcntl.flock = lambda *_: None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", str(library_without_locks(tmp_path)))
    settings = (*SMALL_RUN, f"num_global_steps={STEPS}", "checkpoint.every_steps=2")
    older = launches("shared", *settings)
    older.wait_for("checkpoints/latest", 120)
    newer = launches("shared", *settings)
    status, output = older.wait(90)
    assert status == 2, output
    last = output.rstrip().splitlines()[-1]
    assert last.startswith("error: name = shared: start 2 of the run (on ")
    assert "Traceback" not in output
    assert newer.process.poll() is None, newer.wait(5)[1]
    status, output = newer.wait(240)
    assert status == 0, output
    with closing(sqlite3.connect(newer.run_dir / "journal.sqlite")) as journal:
        assert journal.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        consumed = journal.execute("SELECT consumed_step, count(*) FROM groups WHERE state = 'consumed' GROUP BY 1")
        assert consumed.fetchall() == [(step, 4) for step in range(STEPS)]
    latest = read_latest(newer.run_dir)
    assert latest is not None
    assert latest.policy_version == STEPS
