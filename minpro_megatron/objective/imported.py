"""An objective of the user's, which `objective.name` gives by its import path (docs/extending.md)."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

from minpro_megatron.config.objective import ImportedObjectiveConfig
from minpro_megatron.hooks.hook import Hook
from minpro_megatron.objective.across_ranks.scan import WholeSequenceScan
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens, policy_tokens


class ObjectiveFunction(Protocol):
    """Each token's part of the loss, from the tokens of one rank's shard and `objective.settings`."""

    def __call__(self, tokens: PolicyTokens, settings: dict[str, Any], /) -> ObjectiveTerms: ...


def imported_objective(hook: Hook) -> Callable[[PolicyTokens, ImportedObjectiveConfig], ObjectiveTerms]:
    """The function of the hook, whose results are checked. Raises UserError if it cannot be loaded.

    The result raises HookError for a result that is against the rule of `checked_terms`.
    """
    function: ObjectiveFunction = hook.load()

    def terms(tokens: PolicyTokens, settings: ImportedObjectiveConfig) -> ObjectiveTerms:
        with hook.running():
            found = function(tokens, dict(settings.settings))
        return checked_terms(hook, tokens, found)

    return terms


def checked_terms(hook: Hook, tokens: PolicyTokens, found: object) -> ObjectiveTerms:
    """`found`, with float64 numbers and without gradient. Raises HookError unless it is ObjectiveTerms with one value
    per slot in each field, numbers or bools, and finite coefficients and values where the inputs are finite.

    The last check waits for the device once per micro-batch; the project's own objectives do not need it.
    """
    if not isinstance(found, ObjectiveTerms):
        raise hook.error(f"it must return ObjectiveTerms, not {type(found).__name__}")
    shape = tokens.mask_L.shape
    kept: dict[str, Tensor] = {}
    for field in fields(ObjectiveTerms):
        value = getattr(found, field.name)
        if not isinstance(value, Tensor) or value.shape != shape:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise hook.error(f"{field.name} must be a tensor of shape {tuple(shape)}, one value per slot, not {given}")
        is_flag = field.name in ("clipped_L", "excluded_L")
        if is_flag != (value.dtype == torch.bool) or value.is_complex():
            raise hook.error(f"{field.name} must be a tensor of {'bool' if is_flag else 'numbers'}, not {value.dtype}")
        kept[field.name] = value.detach() if is_flag else value.detach().double()
    inputs_are_finite_L = tokens.log_ratio_L.isfinite() & tokens.advantages_L.isfinite() & tokens.is_trained_L
    for name in ("coefficients_L", "value_L"):
        if (wrong := int((inputs_are_finite_L & ~kept[name].isfinite()).sum())) > 0:
            raise hook.error(
                f"{name} is not finite for {wrong} trained tokens whose log-ratio and advantage are finite"
            )
    return ObjectiveTerms(**kept)


def try_objective(settings: ImportedObjectiveConfig) -> None:
    """Calls the function of `settings` on the tokens of two short responses, one of which has a masked token.

    Raises UserError if it cannot be loaded, HookError for a wrong result, and whatever the function raises.
    """
    sequence, mask = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    log_probs, behavior = torch.tensor([-1.0, -2.0, -9.0, -0.5, -3.0]), torch.tensor([-1.5, -1.0, -1.0, -0.5, -1.0])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    tokens = policy_tokens(log_probs, behavior, advantages, mask, WholeSequenceScan(sequence, mask), torch.arange(5))
    imported_objective(Hook("objective.name", settings.name))(tokens, settings)
