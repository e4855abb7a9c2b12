"""The check of the log-prob kernel: it passes for the kernel, and fails for wrong, slow and wasteful ones."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minpro_megatron.gpu_checks import log_probs
from minpro_megatron.gpu_checks.log_prob_ways import (
    CHUNK_TOKENS,
    Problem,
    forward_and_backward,
    in_chunks,
    in_float64,
    make_problem,
    naive,
    ours,
)
from minpro_megatron.gpu_checks.meter import Meter, relative_error
from minpro_megatron.gpu_checks.outcome import Limit

CPU = torch.device("cpu")
SHAPES, LIMITS = log_probs.SMALL


def test_the_kernel_passes() -> None:
    outcome = log_probs.check(CPU, SHAPES, LIMITS)
    assert outcome.problems == []
    assert {
        "ours_forward_ms",
        "naive_backward_ms",
        "chunks_forward_ms",
        "share_of_product_rate",
    } <= outcome.figures.keys()


@pytest.mark.parametrize("way", [naive, in_chunks])
def test_the_other_ways_compute_the_same(way: Callable[[Problem], tuple[Tensor, Tensor]]) -> None:
    problem = make_problem(CHUNK_TOKENS + 40, 200, 16, torch.float32, CPU)  # more than one chunk
    for one, other in zip(forward_and_backward(problem, way), in_float64(problem), strict=True):
        assert relative_error(one, other) < 1e-5


def without_temperature(problem: Problem) -> tuple[Tensor, Tensor]:
    log_softmax = (problem.hidden_TH @ problem.weight_VH.t()).log_softmax(-1)
    return log_softmax.gather(1, problem.labels_T[:, None])[:, 0], -(log_softmax.exp() * log_softmax).sum(-1).detach()


def with_another_gradient(problem: Problem) -> tuple[Tensor, Tensor]:
    """The right values; the last token's hidden state gets no gradient."""
    last = problem.hidden_TH[-1:].detach()
    return ours(replace(problem, hidden_TH=torch.cat([problem.hidden_TH[:-1], last])))


def with_entropy_in_bits(problem: Problem) -> tuple[Tensor, Tensor]:
    log_probs, entropies = ours(problem)
    return log_probs, entropies / 0.6931


@pytest.mark.parametrize(
    ("kernel", "figures"),
    [
        (without_temperature, ["log_prob_error", "entropy_error", "d_hidden_error", "d_weight_error"]),
        (with_another_gradient, ["d_hidden_error"]),
        (with_entropy_in_bits, ["entropy_error"]),
    ],
)
def test_a_wrong_kernel_fails(kernel: Callable, figures: list[str]) -> None:
    outcome = log_probs.check(CPU, SHAPES, LIMITS, kernel)
    assert [problem.split(" ")[0] for problem in outcome.problems] == figures


class Gpu(Meter):
    """Counts as a GPU would: this project's way, which comes first, takes `own` bytes, the others 1,000 above the
    gradients."""

    def __init__(self, own: int, gradients: int) -> None:
        super().__init__(CPU)
        self._peaks = iter([own + gradients, *[1000 + gradients] * 9])

    def peak_bytes(self, work: Callable[[], object]) -> int:
        work()
        return next(self._peaks)

    def median_seconds(self, work: Callable[[], object], rounds: int) -> float:
        return 1e-3


@pytest.mark.parametrize(("own", "problems"), [(100, 0), (499, 0), (900, 1)])
def test_a_kernel_that_takes_much_memory_fails(own: int, problems: int) -> None:
    gradients = 4 * SHAPES.hidden * (SHAPES.tokens + SHAPES.vocabulary)
    limits = (Limit("bytes_over_naive", at_most=0.5),)
    outcome = log_probs.check(CPU, SHAPES, limits, meter=Gpu(own, gradients))
    assert outcome.figures["ours_extra_bytes"] == own
    assert len(outcome.problems) == problems


def test_a_slow_kernel_fails() -> None:
    limits = (Limit("share_of_product_rate", at_least=0.6), Limit("time_over_naive", at_most=1.1))

    class Slow(Gpu):
        def product_rate(self, dtype: torch.dtype) -> float:
            return 1e15

        def median_seconds(self, work: Callable[[], object], rounds: int) -> float:
            self._calls = getattr(self, "_calls", 0) + 1
            return 1.0 if self._calls <= 2 else 0.5  # this project's two timings come first

    outcome = log_probs.check(CPU, SHAPES, limits, meter=Slow(0, 0))
    assert [problem.split(" ")[0] for problem in outcome.problems] == ["share_of_product_rate", "time_over_naive"]
