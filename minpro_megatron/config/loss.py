"""Corrections and penalties that can be combined with any objective; all of them are off by default."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section


class TruncatedImportanceConfig(Section):
    """Weights every token by min(pi_trainer / pi_server, cap), both under the weights that sampled it. This corrects
    for the mismatch between the two engines."""

    enabled: bool = Field(default=False, description="Switch the truncated importance weights on.")
    cap: float = Field(default=2.0, gt=0, description="Largest importance weight of a token.")


class IcePopConfig(Section):
    """IcePop, arXiv:2510.18855: masks the tokens whose pi_trainer / pi_server under the sampling weights is outside
    low .. high, and weights the others by it (truncated if truncated_importance is on too)."""

    enabled: bool = Field(default=False, description="Switch IcePop on.")
    low: float = Field(default=0.5, gt=0, le=1, description="Tokens with a smaller ratio are masked.")
    high: float = Field(default=5.0, ge=1, description="Tokens with a larger ratio are masked.")


class DecoupledConfig(Section):
    """Decoupled PPO, arXiv:2505.24298: ratios against the policy at the start of the global step, every token weighted
    by pi_start / pi_behavior; tokens whose weight exceeds `largest_weight` are masked. Costs one scoring pass per
    global step."""

    enabled: bool = Field(default=False, description="Switch decoupled PPO on.")
    largest_weight: float = Field(
        default=5.0, gt=0, description="Tokens whose weight pi_start / pi_behavior is larger are masked."
    )


class KlConfig(Section):
    """A KL penalty toward the initial weights (arXiv:2402.03300); costs one scoring pass per batch."""

    enabled: bool = Field(default=False, description="Switch the KL penalty on.")
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3", description="Estimator of the KL divergence per token; k3 is GRPO's, unbiased and never negative."
    )
    coefficient: float = Field(default=1e-3, ge=0, description="Factor of the penalty in the loss.")


class OverlongPenaltyConfig(Section):
    """DAPO's soft overlong punishment (arXiv:2503.14476, equation 13): the reward falls by up to `scale` over the last
    `buffer_tokens` before the length limit."""

    enabled: bool = Field(default=False, description="Switch the penalty for long responses on.")
    buffer_tokens: int = Field(
        default=4096,
        ge=1,
        description="Number of tokens before sampling.max_response_tokens over which the penalty grows linearly.",
    )
    scale: float = Field(
        default=1.0, gt=0, description="Penalty of a response of the maximum length, subtracted from its reward."
    )


class LossConfig(Section):
    """The advantage, and corrections and penalties. They work with every objective and independently of each other."""

    advantage: Literal["group_normalized", "group_mean", "leave_one_out"] = Field(
        default="group_normalized",
        description="Advantage of a response, from the rewards R of its group. group_normalized: (R - mean) / standard "
        "deviation, as in GRPO. group_mean: R - mean, as in Dr. GRPO and PrefixRL's REINFORCE. leave_one_out: R minus "
        "the mean of the other rewards, as in RLOO.",
    )
    truncated_importance: TruncatedImportanceConfig = TruncatedImportanceConfig()
    icepop: IcePopConfig = IcePopConfig()
    decoupled: DecoupledConfig = DecoupledConfig()
    kl: KlConfig = KlConfig()
    overlong_penalty: OverlongPenaltyConfig = OverlongPenaltyConfig()
    equal_reward_groups: Literal["keep", "mask"] = Field(
        default="keep",
        description="Treatment of groups whose rewards are all equal, which give no gradient: keep counts their tokens "
        "in the loss's denominator, mask does not.",
    )
