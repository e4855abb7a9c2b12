"""The settings of each policy objective; the objective's name selects its section."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section

Aggregation = Literal["token_mean", "sequence_mean"]


class ObjectiveSection(Section):
    """What every objective has: how its tokens' losses are averaged over the optimizer mini-batch."""

    aggregation: Aggregation = "token_mean"


class ClippedWeightSection(ObjectiveSection):
    """A weight clipped to 1 - clip_low .. 1 + clip_high; the defaults are those of arXiv:2601.22718, Table 3."""

    clip_low: float = Field(default=1.0, ge=0, le=1)
    clip_high: float = Field(default=4.0, ge=0)


class MinproConfig(ClippedWeightSection):
    """MinPRO, arXiv:2601.22718: clip(prefix_min_t * ratio_t)."""

    name: Literal["minpro"] = "minpro"


class CispoConfig(ClippedWeightSection):
    """CISPO, arXiv:2506.13585: clip(ratio_t)."""

    name: Literal["cispo"] = "cispo"


class PrefixRatioConfig(ClippedWeightSection):
    """clip(product of the ratios up to t): the first attempt that arXiv:2601.22718 reports as failed."""

    name: Literal["prefix_ratio"] = "prefix_ratio"


class PrefixFilterConfig(ClippedWeightSection):
    """CISPO without the tokens of the smallest prefix ratios: the second failed attempt of arXiv:2601.22718."""

    name: Literal["prefix_filter"] = "prefix_filter"
    quantile: float = Field(default=0.01, gt=0, lt=1, description="share of the mini-batch's tokens left out")


class ScaledCispoConfig(ClippedWeightSection):
    """CISPO with the learning rate times the mini-batch's mean prefix minimum: is MinPRO only a smaller step?"""

    name: Literal["scaled_cispo"] = "scaled_cispo"


class ShuffledMinproConfig(ClippedWeightSection):
    """MinPRO with the prefix minima permuted among tokens of like position: does the prefix itself matter?"""

    name: Literal["shuffled_minpro"] = "shuffled_minpro"


class GrpoConfig(ObjectiveSection):
    """GRPO with DAPO's asymmetric clip and dual clip, arXiv:2402.03300 and arXiv:2503.14476."""

    name: Literal["grpo"] = "grpo"
    clip_low: float = Field(default=0.2, ge=0, le=1)
    clip_high: float = Field(default=0.28, ge=0)
    dual_clip: float = Field(default=10.0, gt=1)

    @model_validator(mode="after")
    def _dual_clip_is_beyond_the_clip(self) -> "GrpoConfig":
        if self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip = {self.dual_clip} must exceed 1 + clip_high = {1 + self.clip_high}")
        return self


class GspoConfig(ObjectiveSection):
    """GSPO, arXiv:2507.18071: PPO's clip on the geometric mean of a sequence's ratios.

    The clip is the one that arXiv:2601.22718 compares with; GSPO's own paper uses 3e-4 and 4e-4.
    """

    name: Literal["gspo"] = "gspo"
    aggregation: Aggregation = "sequence_mean"
    clip_low: float = Field(default=2e-3, ge=0, le=1)
    clip_high: float = Field(default=2e-3, ge=0)


class M2poConfig(ObjectiveSection):
    """M2PO, arXiv:2510.01161, Algorithm 1: harmful tokens are masked until their second moment is small enough."""

    name: Literal["m2po"] = "m2po"
    second_moment: float = Field(default=0.04, gt=0, description="largest mean of squared log-ratios, nats^2")


class M2poWinsorizedConfig(ObjectiveSection):
    """M2PO as its authors' code has it: one clip for all tokens, found by capping the squared log-ratios."""

    name: Literal["m2po_winsorized"] = "m2po_winsorized"
    second_moment: float = Field(default=0.04, gt=0, description="largest mean of capped squared log-ratios, nats^2")
    clip_low: float = Field(default=0.3, ge=0, lt=1, description="the clip is never tighter than 1 - this")
    clip_high: float = Field(default=0.5, ge=0, description="the clip is never tighter than 1 + this")


class CtpoConfig(ObjectiveSection):
    """CTPO, arXiv:2605.07331: PPO's clip on the product of the ratios up to t, bounds growing with sqrt(t).

    The authors' code: aggregation = token_mean, log_clamp = 10.
    """

    name: Literal["ctpo"] = "ctpo"
    aggregation: Aggregation = "sequence_mean"
    log_clip_low: float = Field(default=0.025, ge=0, description="lower bound: exp(-this * sqrt(t))")
    log_clip_high: float = Field(default=0.05, ge=0, description="upper bound: exp(this * sqrt(t))")
    log_dual_clip: float = Field(default=0.05, ge=0, description="bound for A < 0: exp(this * sqrt(t))")
    log_clamp: float | None = Field(default=None, gt=0, description="largest |log of the product|; none: no limit")

    @model_validator(mode="after")
    def _dual_clip_is_not_inside_the_clip(self) -> "CtpoConfig":
        if self.log_dual_clip < self.log_clip_high:
            raise ValueError(
                f"log_dual_clip = {self.log_dual_clip} must not be below log_clip_high = {self.log_clip_high}"
            )
        return self


ObjectiveConfig = Annotated[
    MinproConfig
    | CispoConfig
    | GrpoConfig
    | GspoConfig
    | M2poConfig
    | M2poWinsorizedConfig
    | CtpoConfig
    | PrefixRatioConfig
    | PrefixFilterConfig
    | ScaledCispoConfig
    | ShuffledMinproConfig,
    Field(discriminator="name"),
]
