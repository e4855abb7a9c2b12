"""The settings of each policy objective; the objective's name selects its section."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section

Aggregation = Literal["token_mean", "sequence_mean"]

_NAME = "Name of the objective; it selects the objective's section of settings."
_AGGREGATION = (
    "Average of the loss. token_mean averages it over all tokens of the mini-batch; sequence_mean first averages it "
    "over the tokens of each response, then over the responses."
)


class ObjectiveSection(Section):
    """The setting of every objective: how the losses of tokens are averaged over the optimizer mini-batch."""

    aggregation: Aggregation = Field(default="token_mean", description=_AGGREGATION)


class ClippedWeightSection(ObjectiveSection):
    """A weight clipped to 1 - clip_low .. 1 + clip_high; the defaults are those of arXiv:2601.22718, Table 3."""

    clip_low: float = Field(default=1.0, ge=0, le=1, description="The lower bound of the weight is 1 - clip_low.")
    clip_high: float = Field(default=4.0, ge=0, description="The upper bound of the weight is 1 + clip_high.")


class MinproConfig(ClippedWeightSection):
    """MinPRO, arXiv:2601.22718: clip(prefix_min_t * ratio_t)."""

    name: Literal["minpro"] = Field(default="minpro", description=_NAME)


class CispoConfig(ClippedWeightSection):
    """CISPO, arXiv:2506.13585: clip(ratio_t)."""

    name: Literal["cispo"] = Field(default="cispo", description=_NAME)


class PrefixRatioConfig(ClippedWeightSection):
    """clip(product of the ratios up to t): the first attempt that arXiv:2601.22718 reports as failed."""

    name: Literal["prefix_ratio"] = Field(default="prefix_ratio", description=_NAME)


class PrefixFilterConfig(ClippedWeightSection):
    """CISPO without the tokens of the smallest prefix ratios: the second failed attempt of arXiv:2601.22718."""

    name: Literal["prefix_filter"] = Field(default="prefix_filter", description=_NAME)
    quantile: float = Field(default=0.01, gt=0, lt=1, description="Share of the mini-batch's tokens that are masked.")


class ScaledCispoConfig(ClippedWeightSection):
    """CISPO with the learning rate times the mini-batch's mean prefix minimum: is MinPRO only a smaller step?"""

    name: Literal["scaled_cispo"] = Field(default="scaled_cispo", description=_NAME)


class ShuffledMinproConfig(ClippedWeightSection):
    """MinPRO with the prefix minima permuted among tokens at similar positions: does the prefix itself matter?"""

    name: Literal["shuffled_minpro"] = Field(default="shuffled_minpro", description=_NAME)


class GrpoConfig(ObjectiveSection):
    """GRPO with DAPO's asymmetric clip and dual clip, arXiv:2402.03300 and arXiv:2503.14476."""

    name: Literal["grpo"] = Field(default="grpo", description=_NAME)
    clip_low: float = Field(default=0.2, ge=0, le=1, description="The lower bound of the ratio is 1 - clip_low.")
    clip_high: float = Field(default=0.28, ge=0, description="The upper bound of the ratio is 1 + clip_high.")
    dual_clip: float = Field(
        default=10.0,
        gt=1,
        description="Upper bound of the ratio of tokens with a negative advantage; it must exceed 1 + clip_high.",
    )

    @model_validator(mode="after")
    def _dual_clip_is_beyond_the_clip(self) -> "GrpoConfig":
        if self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip = {self.dual_clip} must exceed 1 + clip_high = {1 + self.clip_high}")
        return self


class GspoConfig(ObjectiveSection):
    """GSPO, arXiv:2507.18071: PPO's clip on the geometric mean of a sequence's ratios.

    The default clip is that of the comparison in arXiv:2601.22718; GSPO's own paper uses 3e-4 and 4e-4.
    """

    name: Literal["gspo"] = Field(default="gspo", description=_NAME)
    aggregation: Aggregation = Field(default="sequence_mean", description=_AGGREGATION)
    clip_low: float = Field(
        default=2e-3, ge=0, le=1, description="The lower bound of the sequence's ratio is 1 - clip_low."
    )
    clip_high: float = Field(
        default=2e-3, ge=0, description="The upper bound of the sequence's ratio is 1 + clip_high."
    )


class M2poConfig(ObjectiveSection):
    """M2PO, arXiv:2510.01161, Algorithm 1: harmful tokens are masked until their second moment is small enough."""

    name: Literal["m2po"] = Field(default="m2po", description=_NAME)
    second_moment: float = Field(
        default=0.04,
        gt=0,
        description="Largest mean of the squared log-ratios of the harmful tokens that are kept, in nats^2.",
    )


class M2poWinsorizedConfig(ObjectiveSection):
    """M2PO as in its authors' code: one clip for all tokens, found by capping the squared log-ratios."""

    name: Literal["m2po_winsorized"] = Field(default="m2po_winsorized", description=_NAME)
    second_moment: float = Field(
        default=0.04,
        gt=0,
        description="Largest mean of the capped squared log-ratios of the harmful tokens, in nats^2.",
    )
    clip_low: float = Field(
        default=0.3, ge=0, lt=1, description="The lower bound of the ratio is never above 1 - clip_low."
    )
    clip_high: float = Field(
        default=0.5, ge=0, description="The upper bound of the ratio is never below 1 + clip_high."
    )


class CtpoConfig(ObjectiveSection):
    """CTPO, arXiv:2605.07331: PPO's clip on the product of the ratios up to t, bounds growing with sqrt(t).

    The authors' code: aggregation = token_mean, log_clamp = 10.
    """

    name: Literal["ctpo"] = Field(default="ctpo", description=_NAME)
    aggregation: Aggregation = Field(default="sequence_mean", description=_AGGREGATION)
    log_clip_low: float = Field(
        default=0.025, ge=0, description="The lower bound of the product at token t is exp(-log_clip_low * sqrt(t))."
    )
    log_clip_high: float = Field(
        default=0.05, ge=0, description="The upper bound of the product at token t is exp(log_clip_high * sqrt(t))."
    )
    log_dual_clip: float = Field(
        default=0.05,
        ge=0,
        description="The upper bound of the product at tokens with a negative advantage is "
        "exp(log_dual_clip * sqrt(t)).",
    )
    log_clamp: float | None = Field(
        default=None,
        gt=0,
        description="The log of the product is clamped to this absolute value, in nats; null means no limit.",
    )

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
