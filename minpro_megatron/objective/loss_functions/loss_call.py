"""The loss of an objective from the tensors of a training loop, and what all loss functions have in common.

The functions themselves are in `ratio_losses`, `trust_region_losses` and `smooth_losses` beside this file.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.config.objective import ObjectiveSection
from minpro_megatron.metrics.metric import values
from minpro_megatron.objective.corrections import OtherLogProbs
from minpro_megatron.objective.diagnostics import Statistics, as_metrics, token_statistics
from minpro_megatron.objective.loss_functions.token_batch import (
    ContextLayout,
    TokenBatch,
    refuse_unknown_layout,
    token_batch,
)
from minpro_megatron.objective.registry import objective_for
from minpro_megatron.objective.terms import MiniBatch, ObjectiveTerms, summed_loss, summed_value

# statistics of inputs that these functions do not have: entropies, the server's log-probs, and staleness
_NOT_MEASURED = ("policy/entropy", "mismatch/")
_OF_STALENESS = "_by_staleness/"


class LossOptions(TypedDict, total=False):
    """The arguments that all functions share beside the four tensors."""

    cu_seqlens: Tensor | Sequence[int] | None
    denominator: float | Tensor | None
    context_group: dist.ProcessGroup | None
    context_layout: ContextLayout
    metrics: dict[str, float] | None


_SHARED_DOCUMENTATION = """

    Args:
        log_probs: log-probs of the sampled tokens under the current policy, with gradient: padded [B, T], or packed
            [L] with `cu_seqlens`.
        old_log_probs: the same tokens under the policy that sampled them, of the same shape.
        advantages: one for each token, or one for each sequence ([B], or [sequences]).
        mask: 1 (or True) for the tokens that are trained, of the same shape; other tokens may have any values.
        aggregation: "token_mean" averages over tokens; "sequence_mean" over each sequence, then over sequences.
        cu_seqlens: for packed tensors, the start of each sequence and the end of the last, [sequences + 1].
        denominator: divides the sum over tokens (or sequences). Default: the number of trained tokens (sequences with
            a trained token) of this batch, over all ranks of `context_group`.
        context_group: the ranks that hold shards of these sequences. The result is then this rank's part of the loss;
            the loss is the sum over the group.
        context_layout: "zigzag", of 2C equal chunks of each sequence rank r of C has chunks r and 2C - 1 - r, one
            after the other; "contiguous", rank r has the r-th of C equal chunks.
        metrics: a dict that receives statistics of the batch by name, the same on all ranks of `context_group`.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: shapes or boundaries do not agree, or a setting is outside its range.
    """


def loss_function[Function: Callable[..., Tensor]](function: Function) -> Function:
    """Writes out `**options` in the function's signature and documentation, as help() and editors show them."""
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default="zigzag" if name == "context_layout" else None,
            annotation=annotation,
        )
        for name, annotation in LossOptions.__annotations__.items()
    ]
    function.__signature__ = signature.replace(parameters=[*own, *shared])  # pyright: ignore[reportFunctionMemberAccess]
    function.__doc__ = (function.__doc__ or "") + _SHARED_DOCUMENTATION
    return function


def objective_loss(
    settings: ObjectiveSection,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    denominator: float | Tensor | None = None,
    context_group: dist.ProcessGroup | None = None,
    context_layout: ContextLayout = "zigzag",
    metrics: dict[str, float] | None = None,
    seed: int = 0,
) -> Tensor:
    """The loss of the objective that `settings` (a section of config.objective) selects. The other arguments are those
    of minpro_loss; `seed` is for objectives that draw random numbers."""
    refuse_unknown_layout(context_layout)
    if isinstance(denominator, (int, float)) and not denominator > 0:
        raise ValueError(f"denominator = {denominator}: it must be above 0")
    batch = token_batch(log_probs, old_log_probs, advantages, mask, cu_seqlens, context_group, context_layout)
    terms = _terms(settings, batch, seed)
    weight_L = batch.weights(settings.aggregation)
    own_count = weight_L.double().sum()
    if metrics is not None:
        metrics.update(_measured(batch, terms, (summed_value(terms, weight_L), own_count)))
    if denominator is None:
        denominator = batch.ranks.sum(own_count).clamp(min=1)
    loss = summed_loss(batch.log_probs_L, terms, weight_L)
    return loss / (denominator.to(loss.dtype) if isinstance(denominator, Tensor) else denominator)


def _terms(settings: ObjectiveSection, batch: TokenBatch, seed: int) -> ObjectiveTerms:
    objective, tokens = objective_for(settings), batch.tokens
    if objective.survey is not None:
        (surveyed_L,) = objective.survey(MiniBatch([tokens], batch.ranks, seed), settings)
        tokens = replace(tokens, surveyed_L=surveyed_L)
    return objective.terms(tokens, settings)


def _measured(batch: TokenBatch, terms: ObjectiveTerms, loss: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The statistics of the whole batch by the names of metrics.declared, without those of inputs that are missing."""
    none_L = torch.zeros_like(batch.tokens.log_probs_L)
    others = OtherLogProbs(behavior_L=none_L, rollout_L=none_L, proximal_L=none_L, reference_L=none_L)
    staleness_L = torch.zeros_like(batch.tokens.ids_L)
    value, count = loss
    mine = token_statistics(batch.tokens, terms, none_L, others, staleness_L, (value, float(count)))
    by_rank = batch.ranks.gather(mine.numbers).view(-1, len(mine.numbers))
    merged, _ = as_metrics([Statistics(numbers, mine.histograms) for numbers in by_rank])
    return {
        name: value
        for name, value in values(merged).items()
        if not name.startswith(_NOT_MEASURED) and _OF_STALENESS not in name
    }
