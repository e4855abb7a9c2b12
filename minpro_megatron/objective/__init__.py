"""The objectives as functions for one's own training loop (docs/python_api.md). They need torch, numpy and pydantic."""

from minpro_megatron.objective.advantages import group_advantages
from minpro_megatron.objective.loss_functions.ratio_losses import (
    cispo_loss,
    ctpo_geomean_loss,
    ctpo_loss,
    grpo_loss,
    gspo_loss,
    m2po_loss,
    m2po_winsorized_loss,
    minpro_loss,
    prefix_filter_loss,
    prefix_ratio_loss,
    scaled_cispo_loss,
    shuffled_minpro_loss,
)
from minpro_megatron.objective.loss_functions.smooth_losses import p3o_loss, pnpo_loss, sapo_loss, vespo_loss
from minpro_megatron.objective.loss_functions.trust_region_losses import cppo_loss, dppo_loss, sat_loss, trm_loss

__all__ = [
    "cispo_loss",
    "cppo_loss",
    "ctpo_geomean_loss",
    "ctpo_loss",
    "dppo_loss",
    "group_advantages",
    "grpo_loss",
    "gspo_loss",
    "m2po_loss",
    "m2po_winsorized_loss",
    "minpro_loss",
    "p3o_loss",
    "pnpo_loss",
    "prefix_filter_loss",
    "prefix_ratio_loss",
    "sapo_loss",
    "sat_loss",
    "scaled_cispo_loss",
    "shuffled_minpro_loss",
    "trm_loss",
    "vespo_loss",
]
