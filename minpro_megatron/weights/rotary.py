"""The angles by which queries and keys are rotated at each position: weights that no file holds."""

import math

import torch
from torch import Tensor

from minpro_megatron.models.architecture import Architecture
from minpro_megatron.models.rope_scaling import RopeScaling


def inverse_frequencies(model: Architecture, device: torch.device | None = None) -> Tensor:
    """Radians per position of each pair of dimensions, float32 [rotated dimensions / 2].

    The operations are those of transformers 5.19 (modeling_rope_utils.py) in the same order, so that the bits are too.
    """
    size = model.rotary_dim
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    plain = 1.0 / (model.rope_theta**exponents)
    scaling = model.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    slow = 1.0 / (scaling.factor * model.rope_theta**exponents)
    kept = 1 - _yarn_slow_share(scaling, size, model.rope_theta, device)
    return slow * (1 - kept) + plain * kept


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    wavelengths = 2 * math.pi / plain
    turns = scaling.original_positions / wavelengths
    slow = torch.where(turns < scaling.few_turns, plain / scaling.factor, plain)
    kept = (turns - scaling.few_turns) / (scaling.many_turns - scaling.few_turns)
    between = (turns >= scaling.few_turns) & (turns <= scaling.many_turns)
    return torch.where(between, (1 - kept) * slow / scaling.factor + kept * slow, slow)


def _yarn_slow_share(scaling: RopeScaling, size: int, theta: float, device: torch.device | None) -> Tensor:
    """The share of the slow rotation for each pair: 0 for the first pairs, 1 for the last ones."""

    def pair_of(turns: float) -> float:
        return size * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_of(scaling.many_turns)), 0)
    last = min(math.ceil(pair_of(scaling.few_turns)), size - 1)
    width = last - first if last != first else 0.001
    pairs = torch.arange(size // 2, dtype=torch.float32, device=device)
    return torch.clamp((pairs - first) / width, 0, 1)
