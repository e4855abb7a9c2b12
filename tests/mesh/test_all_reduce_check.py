"""The sum over all ranks before a run on several nodes: two reach each other, one alone does not wait for ever."""

import os
import subprocess
import sys

import pytest

from minpro_megatron.serving.ports import free_ports


def ranks(present: list[int], limit_s: float) -> list[tuple[int, str]]:
    """Exit status and output of those of two ranks that are `present`."""
    (port,) = free_ports("127.0.0.1", 1)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minpro_megatron.parallel.all_reduce_check", "cpu", str(limit_s)]
    started = [
        subprocess.Popen(
            command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in present
    ]  # fmt: skip
    return [(process.wait(120), process.communicate()[0]) for process in started]


@pytest.mark.mesh
def test_two_ranks_reach_each_other() -> None:
    (first, said), (second, _) = ranks([0, 1], 60)
    assert (first, second) == (0, 0), said
    assert said.splitlines()[-1].startswith("all-reduce over 2 ranks in ")


@pytest.mark.mesh
@pytest.mark.long
def test_a_rank_that_nobody_meets_says_so() -> None:
    ((status, said),) = ranks([0], 1)
    assert status == 1
    assert "rank 0: " in said
    assert "Traceback" not in said
