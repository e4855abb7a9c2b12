"""The parts of the meter that need no GPU."""

import math

import pytest
import torch

from minpro_megatron.gpu_checks.meter import Meter, relative_error


def test_a_cpu_has_no_counters_but_the_work_is_done() -> None:
    meter, done = Meter(torch.device("cpu")), []
    assert meter.peak_bytes(lambda: done.append(1)) is None
    assert meter.host_waits(lambda: done.append(1)) is None
    assert meter.held_bytes() is None
    assert meter.median_seconds(lambda: done.append(1), rounds=3) >= 0
    assert len(done) == 5
    assert meter.product_rate(torch.float32) > 0


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0], [0.0], 0.0),
        ([1e-9], [0.0], math.inf),
        ([math.nan], [1.0], math.inf),
        ([math.inf], [1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_relative_errors(found: list[float], expected: list[float], error: float) -> None:
    assert relative_error(torch.tensor(found), torch.tensor(expected)) == pytest.approx(error)
