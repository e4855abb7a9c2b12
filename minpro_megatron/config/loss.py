"""Corrections and penalties that can be combined with any objective; all of them are off by default."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.hooks.hook import is_import_path

# The names of objective.advantages.ADVANTAGES.
ADVANTAGES = ("group_normalized", "group_mean", "leave_one_out")


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


class SequenceImportanceConfig(Section):
    """Weights all tokens of a sequence by min(product of pi_trainer / pi_server over its trained tokens, cap), both
    under the weights that sampled it: the importance weight of the whole sequence, where truncated_importance has that
    of a token. The default cap is that of CTPO, arXiv:2605.07331."""

    enabled: bool = Field(default=False, description="Switch the importance weights of whole sequences on.")
    cap: float = Field(default=5.0, gt=0, description="Largest importance weight of a sequence.")


class RejectionConfig(Section):
    """Masks sequences, or tokens, in which servers and trainer differ too much under the sampling weights: those whose
    `statistic` of an estimate of KL(server || trainer) per token is outside low .. high. The defaults are those of
    verl's rejection by k3."""

    enabled: bool = Field(default=False, description="Switch the rejection on.")
    statistic: Literal["token", "sum", "mean", "max"] = Field(
        default="mean",
        description="What is compared with the bounds. sum, mean or max: of the estimate over the trained tokens of a "
        "sequence, which mask whole sequences; token: the estimate of each token, which masks single tokens.",
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        default="k3",
        description="Estimator of the KL divergence per token, in nats. With d = log pi_server - log pi_trainer: "
        "k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d; only k1 may be negative.",
    )
    low: float | None = Field(default=None, description="Smaller values of the statistic are masked; null: none are.")
    high: float | None = Field(default=0.01, description="Larger values of the statistic are masked; null: none are.")

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> "RejectionConfig":
        if self.low is None and self.high is None:
            raise ValueError("low and high are both null: the rejection needs one of them")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low = {self.low} must not exceed high = {self.high}")
        return self


class OffPolicyMaskingConfig(Section):
    """Off-policy sequence masking, arXiv:2512.02556 (DeepSeek-V3.2): masks the sequences with a negative advantage that
    the policy has moved away from, by training or by the mismatch of the engines: those whose mean of
    log(pi_server / pi) over their trained tokens exceeds `largest_mean_log_ratio`."""

    enabled: bool = Field(default=False, description="Switch off-policy sequence masking on.")
    largest_mean_log_ratio: float | None = Field(
        default=None,
        description="Sequences with a negative advantage and a larger mean of log(pi_server / pi), in nats per token, "
        "are masked. It has no default: the report states no value.",
    )

    @model_validator(mode="after")
    def _has_a_limit(self) -> "OffPolicyMaskingConfig":
        if self.enabled and self.largest_mean_log_ratio is None:
            raise ValueError("largest_mean_log_ratio is null: off-policy masking needs a limit, such as 0.05")
        return self


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

    advantage: str = Field(
        default="group_normalized",
        description="Advantage of a response, from the rewards R of its group. group_normalized: (R - mean) / standard "
        "deviation, as in GRPO. group_mean: R - mean, as in Dr. GRPO and PrefixRL's REINFORCE. leave_one_out: R minus "
        "the mean of the other rewards, as in RLOO. Or your own function as package.module:function.",
    )
    truncated_importance: TruncatedImportanceConfig = TruncatedImportanceConfig()
    icepop: IcePopConfig = IcePopConfig()
    sequence_importance: SequenceImportanceConfig = SequenceImportanceConfig()
    rejection: RejectionConfig = RejectionConfig()
    off_policy_masking: OffPolicyMaskingConfig = OffPolicyMaskingConfig()
    decoupled: DecoupledConfig = DecoupledConfig()
    kl: KlConfig = KlConfig()
    overlong_penalty: OverlongPenaltyConfig = OverlongPenaltyConfig()
    equal_reward_groups: Literal["keep", "mask"] = Field(
        default="keep",
        description="Treatment of groups whose rewards are all equal, which give no gradient: keep counts their tokens "
        "in the loss's denominator, mask does not.",
    )

    @model_validator(mode="after")
    def _the_mismatch_is_weighed_once(self) -> "LossConfig":
        by_token = [name for name in ("truncated_importance", "icepop") if getattr(self, name).enabled]
        if self.sequence_importance.enabled and by_token:
            raise ValueError(
                f"sequence_importance and {by_token[0]} are both enabled: both weigh for the same mismatch; disable "
                "one of them (rejection with statistic = token masks tokens without weighing them)"
            )
        return self

    @property
    def reads_rollout_log_probs(self) -> bool:
        """Whether a correction compares the trainer's log-probs with those that the servers reported."""
        corrections = (
            self.truncated_importance,
            self.icepop,
            self.sequence_importance,
            self.rejection,
            self.off_policy_masking,
        )
        return any(correction.enabled for correction in corrections)

    @field_validator("advantage")
    @classmethod
    def _advantage_is_known(cls, name: str) -> str:
        if name not in ADVANTAGES and not is_import_path(name):
            raise ValueError(
                f"there is no such advantage; known: {', '.join(ADVANTAGES)}, or the import path of your own function, "
                "such as package.module:function"
            )
        return name
