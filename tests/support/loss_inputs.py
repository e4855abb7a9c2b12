"""The tokens of ragged sequences as a training loop gives them to the loss functions: packed or padded."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minpro_megatron import objective
from minpro_megatron.objective.registry import OBJECTIVES
from tests.support.ragged_tokens import Tokens

FUNCTIONS = {name: getattr(objective, f"{name}_loss") for name in OBJECTIVES}


@dataclass(frozen=True)
class LossInputs:
    """The four tensors; `places` are the places of the tokens in `Tokens`, -1 for padding."""

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    places: np.ndarray

    def loss(self, name: str, **arguments: Any) -> tuple[float, np.ndarray]:
        """(the loss, its gradient by the log-prob of every token of `Tokens` that is here)."""
        log_probs = self.log_probs.clone().requires_grad_()
        found = FUNCTIONS[name](log_probs, self.old_log_probs, self.advantages, self.mask, **arguments)
        found.backward()
        assert log_probs.grad is not None
        gradient = np.zeros(self.places.max(initial=-1) + 1)
        gradient[self.places[self.places >= 0]] = log_probs.grad.numpy()[self.places >= 0]
        assert not log_probs.grad.numpy()[self.places < 0].any()
        return found.item(), gradient

    def where(self, chosen: np.ndarray) -> "LossInputs":
        """The columns `chosen` of padded tensors."""
        return LossInputs(*(values[..., chosen] for values in vars(self).values()))


def packed(tokens: Tokens, dtype: torch.dtype = torch.float64) -> tuple[LossInputs, list[int]]:
    """([L] tensors, the boundaries of the sequences)."""
    return _at(tokens, np.arange(len(tokens.mask)), dtype), [0, *np.cumsum(_lengths(tokens)).tolist()]


def padded(tokens: Tokens, multiple: int = 1, dtype: torch.dtype = torch.float64) -> LossInputs:
    """[B, T] tensors, T the smallest `multiple` that holds the longest sequence, with NaN in the padding."""
    lengths = _lengths(tokens)
    width = -(-int(lengths.max()) // multiple) * multiple
    column = np.arange(width)[None, :]
    starts = np.cumsum(lengths) - lengths
    return _at(tokens, np.where(column < lengths[:, None], starts[:, None] + column, -1), dtype)


def _lengths(tokens: Tokens) -> np.ndarray:
    return np.unique(tokens.sequence, return_counts=True)[1]


def _at(tokens: Tokens, places: np.ndarray, dtype: torch.dtype) -> LossInputs:
    def filled(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.where(places >= 0, values[places], np.nan)).to(dtype)

    mask = torch.from_numpy((places >= 0) & (tokens.mask > 0)[places])
    return LossInputs(filled(tokens.log_probs), filled(tokens.behavior), filled(tokens.advantages), mask, places)
