"""The gradient of an optimizer mini-batch, and how much it would differ with other prompts.

A mini-batch's gradient is a sum over its prompt groups, which are independent of each other; their spread estimates the
variance of the sum. What an objective computes from the whole mini-batch is given in the coefficients and counts as
fixed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minpro_megatron.config.objective import ObjectiveSection
from minpro_megatron.objective.loss_functions.loss_call import objective_loss


@dataclass(frozen=True)
class Gradient:
    """The gradient of a mini-batch as one vector, with its squared norm and the estimated trace of its covariance."""

    vector: Tensor
    squared_norm: float
    variance: float


@dataclass(frozen=True)
class MiniBatch:
    """The responses of one update, those of a prompt one after the other. B responses, T tokens of a response."""

    sequences: Tensor  # int64, prompt and response
    behavior_log_probs_BT: Tensor
    advantages_B: Tensor
    num_groups: int
    seed: int  # for objectives that draw random numbers


def forward_groups(
    log_probs: Callable[[Tensor], tuple[Tensor, Tensor]], batch: MiniBatch
) -> tuple[list[Tensor], Tensor]:
    """(log-probs of each prompt group with their graphs, entropies of all)."""
    groups = [log_probs(group) for group in batch.sequences.chunk(batch.num_groups)]
    return [one for one, _ in groups], torch.cat([entropies for _, entropies in groups])


def loss_slopes(
    settings: ObjectiveSection, log_probs: Sequence[Tensor], batch: MiniBatch, metrics: dict[str, float] | None = None
) -> Sequence[Tensor]:
    """d loss / d log-probs of each prompt group. The loss is the objective's for the whole mini-batch."""
    leaf_BT = torch.cat([one.detach() for one in log_probs]).requires_grad_()
    loss = objective_loss(
        settings,
        leaf_BT,
        batch.behavior_log_probs_BT,
        batch.advantages_B,
        torch.ones_like(leaf_BT),
        metrics=metrics,
        seed=batch.seed,
    )
    (slopes,) = torch.autograd.grad(loss, leaf_BT)
    return slopes.chunk(batch.num_groups)


def gradient(model: nn.Module, log_probs: Sequence[Tensor], slopes: Sequence[Tensor], keep_graph: bool) -> Gradient:
    """The gradient that `slopes` give. With `keep_graph` another objective's can be computed from the same pass."""
    parameters = list(model.parameters())
    parts = []
    for output, slope in zip(log_probs, slopes, strict=True):
        found = torch.autograd.grad(output, parameters, slope, retain_graph=keep_graph)
        parts.append(torch.cat([part.reshape(-1) for part in found]))
    stacked = torch.stack(parts)
    return Gradient(stacked.sum(0), *moments(stacked))


def moments(parts: Tensor) -> tuple[float, float]:
    """(squared norm, variance) of the sum of independent `parts` [groups, parameters].

    The variance of a sum of n independent terms is n times that of one, which is estimated with Bessel's correction,
    and summed over the parameters.

    >>> moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    (16.0, 4.0)
    """
    spread = (parts.double() - parts.double().mean(0)).square().sum()
    return float(parts.double().sum(0).square().sum()), float(len(parts) * spread / (len(parts) - 1))
