"""The sum over all ranks before a run on several nodes: two reach each other, one alone does not wait for ever."""

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
from typing import Any

import pytest

from minpro_megatron.serving.ports import free_ports
from tests.mesh import harness  # whose fork server has imported torch

assert harness
pytestmark = pytest.mark.mesh


def environment(world_size: int) -> dict[str, str]:
    """What all ranks of a node share."""
    (port,) = free_ports("127.0.0.1", 1)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return shared | {"WORLD_SIZE": str(world_size)}


def ranks(present: list[int], limit_s: float) -> list[tuple[int, str]]:
    """Exit status and output of those of two ranks that are `present`."""
    shared = environment(world_size=2)
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    started = [context.Process(target=_rank, args=(rank, shared, limit_s, results)) for rank in present]
    for process in started:
        process.start()
    found = dict(results.get(timeout=120) for _ in started)
    for process in started:
        process.join(20)
    return [found[rank] for rank in present]


def _rank(rank: int, shared: dict[str, str], limit_s: float, results: Any) -> None:
    from minpro_megatron.parallel import all_reduce_check

    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    sys.argv = ["all_reduce_check", "cpu", str(limit_s)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = all_reduce_check.main()
    results.put((rank, (status, said.getvalue())))


def test_two_ranks_reach_each_other() -> None:
    (first, said), (second, _) = ranks([0, 1], 60)
    assert (first, second) == (0, 0), said
    assert said.splitlines()[-1].startswith("all-reduce over 2 ranks in ")


def test_a_rank_that_nobody_meets_says_so() -> None:
    ((status, said),) = ranks([0], 1)
    assert status == 1
    assert "rank 0: " in said
    assert "Traceback" not in said


@pytest.mark.long  # an import of torch
@pytest.mark.parametrize(("world_size", "status"), [(1, 0), (2, 1)])
def test_the_program_ends_with_the_status_that_a_node_reads(world_size: int, status: int) -> None:
    """One rank, of which there are one or two."""
    command = [sys.executable, "-m", "minpro_megatron.parallel.all_reduce_check", "cpu", "2"]
    shared = environment(world_size) | {"RANK": "0", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | shared, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    assert done.stdout.startswith("all-reduce over 1 ranks in ") == (status == 0)
    assert ("rank 0: " in done.stderr) == (status == 1)
