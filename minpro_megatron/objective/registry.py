"""The objectives by name. A run selects one when the policy is built.

A new objective needs one function in a file of formulas/, one line here, and its settings in config/objective.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minpro_megatron.config.objective import ImportedObjectiveConfig, ObjectiveSection, SftConfig
from minpro_megatron.hooks.hook import Hook
from minpro_megatron.objective.formulas.cispo import cispo
from minpro_megatron.objective.formulas.controls import (
    prefix_filter,
    prefix_ratio,
    shuffled_minpro,
    shuffled_prefix_minima,
    small_prefix_ratios,
)
from minpro_megatron.objective.formulas.cppo import cppo
from minpro_megatron.objective.formulas.ctpo import ctpo, ctpo_geomean
from minpro_megatron.objective.formulas.dppo import dppo
from minpro_megatron.objective.formulas.grpo import grpo
from minpro_megatron.objective.formulas.gspo import gspo
from minpro_megatron.objective.formulas.likelihood import negative_log_likelihood
from minpro_megatron.objective.formulas.m2po import large_second_moments, m2po, m2po_winsorized, winsorizing_log_ratio
from minpro_megatron.objective.formulas.minpro import minpro
from minpro_megatron.objective.formulas.p3o import effective_sample_size, p3o
from minpro_megatron.objective.formulas.pnpo import pnpo
from minpro_megatron.objective.formulas.sapo import sapo
from minpro_megatron.objective.formulas.sat import contractions, sat
from minpro_megatron.objective.formulas.trm import trm
from minpro_megatron.objective.formulas.vespo import vespo
from minpro_megatron.objective.imported import imported_objective
from minpro_megatron.objective.terms import MiniBatch, ObjectiveTerms, PolicyTokens


@dataclass(frozen=True)
class Objective:
    """`terms` computes each token's part of the loss. Optional: a `survey` of the whole mini-batch that runs before it
    (objective.survey), and the name of a metric whose mean over the mini-batch multiplies the learning rate."""

    terms: Callable[[PolicyTokens, Any], ObjectiveTerms]
    survey: Callable[[MiniBatch, Any], list[Tensor]] | None = None
    learning_rate_factor: str | None = None


def objective_for(settings: ObjectiveSection) -> Objective:
    """The objective that `settings` select. Raises UserError if its import path cannot be loaded."""
    if isinstance(settings, ImportedObjectiveConfig):
        return Objective(imported_objective(Hook("objective.name", settings.name)))
    if isinstance(settings, SftConfig):  # not among OBJECTIVES, which are those of reinforcement learning
        return Objective(negative_log_likelihood)
    return OBJECTIVES[getattr(settings, "name")]  # noqa: B009 (every objective's section has it)


OBJECTIVES: dict[str, Objective] = {
    "minpro": Objective(minpro),
    "cispo": Objective(cispo),
    "grpo": Objective(grpo),
    "gspo": Objective(gspo),
    "m2po": Objective(m2po, survey=large_second_moments),
    "m2po_winsorized": Objective(m2po_winsorized, survey=winsorizing_log_ratio),
    "ctpo": Objective(ctpo),
    "ctpo_geomean": Objective(ctpo_geomean),
    "dppo": Objective(dppo),
    "cppo": Objective(cppo),
    "trm": Objective(trm),
    "sapo": Objective(sapo),
    "vespo": Objective(vespo),
    "pnpo": Objective(pnpo),
    "p3o": Objective(p3o, survey=effective_sample_size),
    "sat": Objective(sat, survey=contractions),
    "prefix_ratio": Objective(prefix_ratio),
    "prefix_filter": Objective(prefix_filter, survey=small_prefix_ratios),
    # it multiplies the learning rate and not the gradient: Adam's normalization would cancel a factor on the gradient
    "scaled_cispo": Objective(cispo, learning_rate_factor="prefix_min/mean"),
    "shuffled_minpro": Objective(shuffled_minpro, survey=shuffled_prefix_minima),
}
