"""Functions that an older torch lacks are added, and those that exist stay."""

from typing import Any

import pytest
import torch.distributed as dist

from minpro_megatron.gpu_checks import older_torch


def test_what_torch_lacks_is_added_and_refuses_to_communicate(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: Any = dist
    there = functions.reduce_scatter_single
    monkeypatch.delattr(dist, "set_timeout")
    monkeypatch.delattr(dist, "all_gather_single")
    older_torch.install()
    assert functions.reduce_scatter_single is there
    assert functions.set_timeout(60, None) is None
    with pytest.raises(NotImplementedError, match="all_gather_single needs a newer torch"):
        functions.all_gather_single(None, None)
