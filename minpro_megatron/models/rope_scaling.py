"""Rotary positions beyond those of pretraining: how config.json says that the rotation is slowed down."""

import math
from dataclasses import dataclass
from typing import Literal, cast

from minpro_megatron.errors import UserError
from minpro_megatron.models.config_fields import ConfigFields

KINDS = ("llama3", "yarn")
# Fields of YaRN that transformers and SGLang read in different ways, or that only one of them reads.
_REFUSED_OF_YARN = ("attention_factor", "attn_factor", "extrapolation_factor", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class RopeScaling:
    """Pairs of dimensions that turn less than `few_turns` times within `original_positions` turn `factor` times more
    slowly; those that turn more than `many_turns` times stay as they are. In between, the share of the slow rotation
    falls linearly: with the number of turns (llama3), or with the number of the pair (yarn, arXiv:2309.00071)."""

    kind: Literal["llama3", "yarn"]
    factor: float
    original_positions: int
    few_turns: float
    many_turns: float

    @property
    def attention_factor(self) -> float:
        """The number by which rotated queries and keys are multiplied."""
        return 0.1 * math.log(self.factor) + 1 if self.kind == "yarn" else 1.0


def read_rope(fields: ConfigFields) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling) of a config.json in either spelling: `rope_theta` and `rope_scaling`, or `rope_parameters`,
    which holds both and is what transformers 5 writes. Raises UserError if they contradict each other."""
    spellings = [fields.within(name) for name in ("rope_parameters", "rope_scaling") if fields.has(name)]
    scalings = {_read_scaling(spelling) for spelling in spellings}
    if len(scalings) > 1:
        raise UserError(f"{fields.where}: rope_parameters and rope_scaling differ; remove the one that is wrong")
    # required: the default differs between versions of transformers, and a wrong value makes every result wrong
    theta = next((spelling for spelling in spellings if spelling.has("rope_theta")), fields).number("rope_theta")
    return theta, scalings.pop() if scalings else None


def _read_scaling(rope: ConfigFields) -> RopeScaling | None:
    kind = rope.text("rope_type" if rope.has("rope_type") else "type", "default")
    if kind == "default":
        return None
    if kind not in KINDS:
        raise UserError(f"{rope.where}: rope_type = {kind!r} is not supported; only default, {' and '.join(KINDS)} are")
    factor = rope.number("factor")
    if factor < 1:
        raise UserError(f"{rope.where}: factor = {factor:g} must be 1 or more")
    original = rope.size("original_max_position_embeddings")
    if kind == "llama3":
        few, many = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    else:
        for field in _REFUSED_OF_YARN:
            rope.only(field, None, None)
        rope.only("truncate", True, True)
        few = rope.number("beta_slow") if rope.has("beta_slow") else 1.0  # the defaults of transformers and SGLang
        many = rope.number("beta_fast") if rope.has("beta_fast") else 32.0
    if few >= many:
        raise UserError(f"{rope.where}: the bounds of the scaling, {few:g} and {many:g}, must be in rising order")
    return RopeScaling(cast(Literal["llama3", "yarn"], kind), factor, original, few, many)
