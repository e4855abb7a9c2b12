"""What the corrections did to the tokens of a mini-batch. Only enabled corrections are counted."""

from torch import Tensor

from minpro_megatron.objective.corrections import Effects
from minpro_megatron.objective.mean_statistics import MeanStatistics, mean_statistics
from minpro_megatron.objective.terms import PolicyTokens


def correction_statistics(tokens: PolicyTokens, effects: Effects) -> MeanStatistics | None:
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
    return mean_statistics(rows)
