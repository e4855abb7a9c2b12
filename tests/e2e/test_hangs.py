"""A rank that stands still ends the run, and those that wait for it say where they were."""

import pickle
import time

import psutil
import pytest

from minpro_megatron.monitor.history import read_history
from tests.e2e.conftest import SMALL_RUN, Launch, Launcher

pytestmark = [pytest.mark.e2e, pytest.mark.long]


def test_a_rank_that_is_stopped_ends_the_run(launches: Launcher) -> None:
    settings = ("num_global_steps=500", "parallel.tensor=2", "debug.hang_timeout_s=15")
    launch = launches("hangs", *SMALL_RUN, *settings)
    deadline = time.monotonic() + 120
    while len(read_history(launch.run_dir)) < 3:
        assert launch.process.poll() is None, launch.wait(5)[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    stopped = _rank(launch, 1)
    stopped.suspend()
    status, output = launch.wait(120)
    assert status == 1, output
    stacks = launch.run_dir / "logs" / "stacks-rank-0.txt"
    assert f"takes longer than debug.hang_timeout_s = 15 s; stacks of all threads in {stacks}" in output
    assert "Thread 0x" in stacks.read_text()
    assert "minpro_megatron/train.py" in stacks.read_text()
    assert not stopped.is_running()
    # the last collectives of the rank that waited: its last one has not ended
    record = pickle.loads((launch.run_dir / "logs" / "collectives" / "0" / "gloo-rank-0").read_bytes())
    assert record["entries"][-1]["state"] != "completed"
    assert record["entries"][-1]["retired"] is False


def _rank(launch: Launch, rank: int) -> psutil.Process:
    trainers = [one for one in launch.descendants() if "train" in one.cmdline() and "--config" in one.cmdline()]
    (found,) = [one for one in trainers if one.environ().get("RANK") == str(rank)]
    return found
