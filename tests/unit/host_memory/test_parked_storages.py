"""Storages that move to host memory: all that share them see the same values afterwards, and memory is really freed."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from minpro_megatron.host_memory import parked_storages
from minpro_megatron.host_memory.parked_storages import ParkedStorages

MIB = 2**20


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_tensors_and_views_have_their_values_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parked_storages, "_PIECE_BYTES", 100)  # several pieces, the last one smaller
    buffer = torch.arange(120, dtype=torch.float32)
    views = [buffer[5:17].view(3, 4), buffer[17:100], buffer.view(torch.uint8)]
    alone = torch.arange(7).bfloat16()
    before = [one.clone() for one in (buffer, *views, alone)]
    parked = ParkedStorages()
    for _ in range(2):
        parked.to_host([views[0], views[1], buffer, alone, torch.empty(0)])
        assert parked.num_bytes == buffer.nbytes + alone.nbytes
        assert [one.untyped_storage().nbytes() for one in (buffer, *views, alone)] == [0] * 5
        parked.to_device()
        parked.to_device()
        assert parked.num_bytes == 0
        for one, value in zip((buffer, *views, alone), before, strict=True):
            assert torch.equal(one, value)
        buffer.add_(1)
        assert torch.equal(views[1], buffer[17:100])  # they still share memory
        before = [one.clone() for one in (buffer, *views, alone)]


def test_other_sizes_take_other_host_memory() -> None:
    parked = ParkedStorages()
    kept: list[Tensor] = [torch.ones(3), torch.ones(5)]
    for tensors in (kept[:1], kept, kept[1:]):
        parked.to_host(tensors)
        with pytest.raises(AssertionError, match="they are away already"):
            parked.to_host(tensors)
        assert sum(one.nbytes for one in parked._host) == sum(4 * size for size in (3, 5) if size in _sizes(tensors))
        parked.to_device()
        assert [one.tolist() for one in kept] == [[1.0] * 3, [1.0] * 5]


def _sizes(tensors: list[Tensor]) -> list[int]:
    return [one.numel() for one in tensors]


def test_the_memory_is_given_back() -> None:
    """One copy exists at a time, besides the kept host memory."""
    tensor, parked = torch.ones(64 * MIB, dtype=torch.uint8), ParkedStorages()
    with_one = resident_bytes()
    parked.to_host([tensor])
    assert abs(resident_bytes() - with_one) < 8 * MIB
    parked.to_device()
    with_both = resident_bytes()
    assert abs(with_both - with_one - 64 * MIB) < 8 * MIB
    parked.to_host([tensor])
    assert abs(resident_bytes() - with_one) < 8 * MIB
