"""The check of shared memory: it passes, and fails for a reader that takes another part of the memory."""

from typing import Any

import torch
from torch import Tensor

from minpro_megatron.gpu_checks import shared_memory
from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.gpu_checks.outcome import Outcome
from minpro_megatron.reference_engine.shared_buckets import read_bucket


def run(limits: Any = None, **options: Any) -> Outcome:
    shapes, own = shared_memory.SMALL
    return shared_memory.check(torch.device("cpu"), shapes, limits or own, **options)


def test_it_passes() -> None:
    outcome = run()
    assert outcome.problems == []
    assert outcome.figures["bytes"] == 5 * 1000 * 2


def shifted(message: str) -> list[tuple[str, Tensor]]:
    return [(name, tensor.roll(1)) for name, tensor in read_bucket(message)]


def other_names(message: str) -> list[tuple[str, Tensor]]:
    return [(name + " ", tensor) for name, tensor in read_bucket(message)]


def test_it_fails_for_other_bytes_or_names() -> None:
    for read in (shifted, other_names):
        assert run(read=read).problems == ["tensors_different = 5, at most 0 is allowed"]


class SlowMeter(Meter):
    def seconds(self, work: Any) -> float:
        super().seconds(work)
        return 1.0


def test_it_fails_for_slow_copies() -> None:
    outcome = run(shared_memory.FULL[1], meter=SlowMeter(torch.device("cpu")))
    assert [problem.split()[0] for problem in outcome.problems] == ["write_gb_per_s", "read_gb_per_s"]
