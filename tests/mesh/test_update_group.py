"""The update group between this process and others that die, hang or never come: whoever waits is set free at once."""

import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh

pytestmark = pytest.mark.mesh

MAX_WAIT_S = 3.0  # against the group's own limit of 60 s
SIZE = 1_000_000


def _waited_s(function: Any) -> float:
    start = time.monotonic()
    with pytest.raises((RuntimeError, dist.DistError)):
        function()
    return time.monotonic() - start


def _host(mesh: Mesh) -> Any:
    from minpro_megatron.publishing.update_group import UpdateGroup

    if mesh.rank == 0:
        group = UpdateGroup(
            address="127.0.0.1", world_size=mesh.control.size(), name="test", backend="gloo", timeout_s=60
        )
        mesh.from_rank_0(group.where)
        return group
    return mesh.from_rank_0(None)


def _broadcast_then_hang(mesh: Mesh) -> float:
    from minpro_megatron.publishing.update_group import join_update_group
    from minpro_megatron.serving.calls import in_thread

    hosted = _host(mesh)
    if mesh.rank == 0:
        hosted.join()
        hosted.broadcast(torch.arange(SIZE))
        sending = in_thread(_waited_s, lambda: hosted.broadcast(torch.arange(SIZE)))
        time.sleep(0.3)
        assert not sending.done()  # rank 1 never asks for it
        hosted.close()
        closed = time.monotonic()
        sending.result()
        found = time.monotonic() - closed
        hosted.close()  # a second time is no harm
        dist.barrier(mesh.control)
        return found
    group = join_update_group(**hosted, rank=mesh.rank, timeout_s=60)
    received = torch.empty(SIZE, dtype=torch.int64)
    dist.broadcast(received, src=0, group=group)
    assert torch.equal(received, torch.arange(SIZE))
    found = 0.0
    if mesh.rank == 2:
        dist.broadcast(received, src=0, group=group)  # needs nothing of rank 1
        found = _waited_s(lambda: dist.broadcast(received, src=0, group=group))
    dist.barrier(mesh.control)
    return found


def test_closing_frees_those_who_wait_beside_a_hung_member() -> None:
    waits = run_mesh(_broadcast_then_hang, data=3, deadline_s=30)
    assert max(waits) < MAX_WAIT_S


def _join_without_rank_1(mesh: Mesh) -> float:
    from minpro_megatron.publishing.update_group import join_update_group

    hosted = _host(mesh)
    found = 0.0
    if mesh.rank == 0:
        joining: Future[float] = Future()
        threading.Thread(target=lambda: joining.set_result(_waited_s(hosted.join)), daemon=True).start()
        time.sleep(0.3)
        assert not joining.done()
        hosted.close()
        found = joining.result(timeout=10)
    elif mesh.rank == 2:
        found = _waited_s(lambda: join_update_group(**hosted, rank=2, timeout_s=60))
    dist.barrier(mesh.control)
    return found


def test_closing_frees_those_who_wait_for_a_member_that_never_comes() -> None:
    waits = run_mesh(_join_without_rank_1, data=3, deadline_s=30)
    assert max(waits) < MAX_WAIT_S
    assert min(waits[0], waits[2]) > 0.1
