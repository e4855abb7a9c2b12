"""How the group of trainer and servers is made."""

import os
import time
from collections.abc import Iterator

import psutil
import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from minpro_megatron.publishing.update_group import UpdateGroup


def test_its_store_listens_on_the_given_address_alone() -> None:
    """torch's own listener is on all interfaces, and its store asks for no key."""
    group = UpdateGroup(address="127.0.0.1", world_size=2, name="test", backend="gloo", timeout_s=5)
    port = group.where["master_port"]
    listening = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    group.close()
    assert listening == {"127.0.0.1"}


@pytest.fixture
def default_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("default_group")
def test_a_join_that_begins_after_the_group_was_closed_fails_at_once() -> None:
    """A server may refuse before this process has begun to join."""
    group = UpdateGroup(address="127.0.0.1", world_size=2, name="test", backend="gloo", timeout_s=5)
    group.close()
    start = time.monotonic()
    with pytest.raises(dist.DistError):
        group.join()
    assert time.monotonic() - start < 2


VARIABLE = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


@pytest.mark.parametrize("before", [None, "1"])  # torchrun sets 1: a member's death would be this process's
def test_nccl_leaves_failures_to_whoever_made_the_group(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def made(*_arguments: object, **_named: object) -> None:
        found.append(os.environ.get(VARIABLE))
        raise RuntimeError("refused")

    monkeypatch.setattr(distributed_c10d, "_new_process_group_helper", made)
    monkeypatch.delenv(VARIABLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    group = UpdateGroup(address="127.0.0.1", world_size=2, name="test", backend="nccl", timeout_s=5)
    with pytest.raises(RuntimeError, match="refused"):
        group.join()
    assert found == ["0"]
    assert os.environ.get(VARIABLE) == before
