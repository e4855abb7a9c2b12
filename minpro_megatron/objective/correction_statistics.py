"""What the corrections did to the tokens of a mini-batch, in a form that merges exactly over ranks.

Only enabled corrections are counted, apart from the statistics of every run (`objective.diagnostics`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minpro_megatron.metrics.metric import Metric, mean, merge
from minpro_megatron.objective.corrections import Effects
from minpro_megatron.objective.terms import PolicyTokens


@dataclass(frozen=True)
class CorrectionStatistics:
    """The sums of a micro-batch's local slots, on the device until the end of the mini-batch."""

    names: tuple[str, ...]  # of the metrics; the same for every micro-batch of a run
    sums: Tensor  # float64 [names, 2]: total and number of observations


def correction_statistics(tokens: PolicyTokens, effects: Effects) -> CorrectionStatistics | None:
    """The statistics of the trained slots (metrics.declared describes them); None if no correction is enabled.

    A sequence is counted on the rank that has its first trained token, and as excluded if that token is.
    """
    trained_L = tokens.is_trained_L
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    if effects.factor_L is not None:
        rows["corrections/weight_mean"] = (effects.factor_L.double(), trained_L)
    for name, excluded_L in effects.excluded.items():
        rows[f"corrections/{name}_tokens"] = (excluded_L.double(), trained_L)
        if name in effects.whole_sequences:
            first_L = trained_L & (tokens.earlier_L == 0)
            rows[f"corrections/{name}_sequences"] = (excluded_L.double(), first_L)
    if not rows:
        return None
    values = torch.stack([torch.where(counted_L, value_L, 0.0) for value_L, counted_L in rows.values()])
    counted = torch.stack([counted_L.double() for _, counted_L in rows.values()])
    return CorrectionStatistics(tuple(rows), torch.stack([values.sum(1), counted.sum(1)], dim=1))


def as_metrics(micro_batches: Sequence[CorrectionStatistics]) -> dict[str, Metric]:
    """The metrics of the micro-batches together, with one transfer from the device; empty for none."""
    if not micro_batches:
        return {}
    sums = torch.stack([one.sums for one in micro_batches]).cpu().tolist()
    return merge([{name: mean(*pair) for name, pair in zip(micro_batches[0].names, of, strict=True)} for of in sums])
