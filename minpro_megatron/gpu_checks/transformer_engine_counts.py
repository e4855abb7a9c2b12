"""What a new number of sequences in a row costs: cuDNN's attention may build a graph for each number."""

import statistics
from dataclasses import dataclass, replace
from functools import partial

from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, make_policy
from minpro_megatron.parallel.mesh import Mesh

_BUILT = 3.0  # a first pass that takes this many times as long as a later one has built something


@dataclass(frozen=True)
class Shapes(Slice):
    counts: tuple[int, ...] = (1, 2, 4, 8, 16, 3, 5, 6, 7, 9, 10, 11)
    backend: str = "transformer_engine"


# A global step of the recipes has rows of up to some dozens of sequences: a second for each number is the most that
# would be lost in the first steps only.
FULL = (
    Shapes(layers=1, tokens=8192, sequence_tokens=8192, row_tokens=8192, experts=16, vocabulary=32768),
    (Limit("largest_first_pass_s", at_most=2),),
)
SMALL = (
    Shapes(layers=1, tokens=128, sequence_tokens=128, row_tokens=128, divisor=32, vocabulary=300, counts=(1, 2, 4, 3)),
    FULL[1],
)


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...], meter: Meter | None = None) -> Outcome:
    """Updates on one row of the same length with different numbers of sequences; each number twice."""
    meter = meter or Meter(mesh.device)
    policy = make_policy(mesh, shapes.config(mesh.device.type), shapes.architecture())
    policy.update(_row(shapes, shapes.counts[0]).sequences(), 1e-6)  # loads and compiles what every row needs
    first, later = [], []
    for count in shapes.counts[1:]:
        sequences = _row(shapes, count).sequences()
        first.append(meter.seconds(partial(policy.update, sequences, 1e-6)))
        later.append(meter.seconds(partial(policy.update, sequences, 1e-6)))
    again = statistics.median(later)
    figures: dict[str, Figure] = {
        "later_pass_s": again,
        "largest_first_pass_s": max(first),
        "mean_first_pass_s": statistics.mean(first),
        "counts": len(first),
        "counts_that_built": sum(one > _BUILT * again for one in first),
    }
    return judged(figures, limits)


def _row(shapes: Shapes, count: int) -> Shapes:
    length = shapes.tokens // count
    return replace(shapes, sequence_tokens=length, tokens=length * count)
