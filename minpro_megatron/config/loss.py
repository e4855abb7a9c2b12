"""What can be switched on around any objective; everything here is off by default."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section


class TruncatedImportanceConfig(Section):
    """Weights every token by min(pi_trainer / pi_server, cap) under the sampling weights: engine mismatch."""

    enabled: bool = False
    cap: float = Field(default=2.0, gt=0)


class IcePopConfig(Section):
    """IcePop, arXiv:2510.18855: leaves out tokens whose pi_trainer / pi_server under the sampling weights is outside
    low .. high, and weights the others by it (truncated, where truncated_importance is on too)."""

    enabled: bool = False
    low: float = Field(default=0.5, gt=0, le=1)
    high: float = Field(default=5.0, ge=1)


class DecoupledConfig(Section):
    """Decoupled PPO, arXiv:2505.24298: ratios against the policy at the start of the global step, every token weighted
    by pi_start / pi_behavior; tokens beyond `largest_weight` are left out. Costs one scoring pass a global step."""

    enabled: bool = False
    largest_weight: float = Field(default=5.0, gt=0)


class KlConfig(Section):
    """A KL penalty toward the initial weights (arXiv:2402.03300); costs one scoring pass a batch."""

    enabled: bool = False
    estimator: Literal["k1", "k2", "k3"] = "k3"
    coefficient: float = Field(default=1e-3, ge=0)


class OverlongPenaltyConfig(Section):
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13): the reward falls by up to `scale` over the last
    `buffer_tokens` before the length limit."""

    enabled: bool = False
    buffer_tokens: int = Field(default=4096, ge=1)
    scale: float = Field(default=1.0, gt=0)


class LossConfig(Section):
    """Corrections and penalties that work with every objective, each on its own."""

    truncated_importance: TruncatedImportanceConfig = TruncatedImportanceConfig()
    icepop: IcePopConfig = IcePopConfig()
    decoupled: DecoupledConfig = DecoupledConfig()
    kl: KlConfig = KlConfig()
    overlong_penalty: OverlongPenaltyConfig = OverlongPenaltyConfig()
    equal_reward_groups: Literal["keep", "mask"] = Field(
        default="keep", description="keep: no gradient, but in the denominator; mask: their tokens do not count"
    )
