"""Means over the local slots that only some runs report, in a form that merges exactly over ranks.

The statistics of every run are in `objective.diagnostics`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minpro_megatron.metrics.metric import Metric, mean, merge


@dataclass(frozen=True)
class MeanStatistics:
    """The sums of a micro-batch's local slots, on the device until the end of the mini-batch."""

    names: tuple[str, ...]  # of the metrics; the same for every micro-batch of a run
    sums: Tensor  # float64 [names, 2]: total and number of observations


def mean_statistics(rows: Mapping[str, tuple[Tensor, Tensor]]) -> MeanStatistics | None:
    """The statistics of `rows`, by metric: (values, float64 [L]; the slots that are counted, bool [L]); None for no
    rows."""
    if not rows:
        return None
    values = torch.stack([torch.where(counted_L, value_L, 0.0) for value_L, counted_L in rows.values()])
    counted = torch.stack([counted_L.double() for _, counted_L in rows.values()])
    return MeanStatistics(tuple(rows), torch.stack([values.sum(1), counted.sum(1)], dim=1))


def as_metrics(micro_batches: Sequence[MeanStatistics]) -> dict[str, Metric]:
    """The metrics of the micro-batches together, with one transfer from the device; empty for none."""
    if not micro_batches:
        return {}
    sums = torch.stack([one.sums for one in micro_batches]).cpu().tolist()
    return merge([{name: mean(*pair) for name, pair in zip(micro_batches[0].names, of, strict=True)} for of in sums])
