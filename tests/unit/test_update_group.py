"""How the group of trainer and servers is made."""

import os

import pytest
from torch.distributed import distributed_c10d

from minpro_megatron.parallel.update_group import UpdateGroup

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
