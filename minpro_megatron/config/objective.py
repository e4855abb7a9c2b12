"""The settings of each policy objective; the objective's name selects its section."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.hooks.hook import is_import_path

Aggregation = Literal["token_mean", "sequence_mean"]
Divergence = Literal["total_variation", "kl"]

_NAME = "Name of the objective; it selects the objective's section of settings."
_AGGREGATION = (
    "Average of the loss. token_mean averages it over all tokens of the mini-batch; sequence_mean first averages it "
    "over the tokens of each response, then over the responses."
)

_DIVERGENCE = (
    "Estimate, from the sampled token alone, of the divergence of the policy pi from the sampling policy mu: |pi - mu| "
    "(total_variation), or KL(mu || pi) of this token against all others, in nats (kl)."
)


class ObjectiveSection(Section):
    """The setting of every objective: how the losses of tokens are averaged over the optimizer mini-batch."""

    # Whether the objective needs the log-probs of the whole mini-batch before its loss, which is one more forward pass.
    surveys_mini_batch: ClassVar[bool] = False
    # Whether the loss compares the policy with the one that sampled the tokens.
    compares_policies: ClassVar[bool] = True

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

    surveys_mini_batch: ClassVar[bool] = True
    name: Literal["prefix_filter"] = Field(default="prefix_filter", description=_NAME)
    quantile: float = Field(default=0.01, gt=0, lt=1, description="Share of the mini-batch's tokens that are masked.")


class ScaledCispoConfig(ClippedWeightSection):
    """CISPO with the learning rate times the mini-batch's mean prefix minimum: is MinPRO only a smaller step?"""

    name: Literal["scaled_cispo"] = Field(default="scaled_cispo", description=_NAME)


class ShuffledMinproConfig(ClippedWeightSection):
    """MinPRO with the prefix minima permuted among tokens at similar positions: does the prefix itself matter?"""

    surveys_mini_batch: ClassVar[bool] = True
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

    surveys_mini_batch: ClassVar[bool] = True
    name: Literal["m2po"] = Field(default="m2po", description=_NAME)
    second_moment: float = Field(
        default=0.04,
        gt=0,
        description="Largest mean of the squared log-ratios of the harmful tokens that are kept, in nats^2.",
    )


class M2poWinsorizedConfig(ObjectiveSection):
    """M2PO as in its authors' code: one clip for all tokens, found by capping the squared log-ratios."""

    surveys_mini_batch: ClassVar[bool] = True
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


class TrustRegionSection(ObjectiveSection):
    """What DPPO and CPPO share: the divergence of their trust region, and a limit of the ratio."""

    divergence: Divergence = Field(default="total_variation", description=_DIVERGENCE)
    largest_ratio: float | None = Field(
        default=None,
        ge=1,
        description="The importance ratio is limited to this value; null means no limit.",
    )


class DppoConfig(TrustRegionSection):
    """DPPO, arXiv:2602.04879: the ratio of the tokens whose probability stays near that of the sampling policy.

    The thresholds are those of the paper's large runs; it has 0.15 for LoRA. With divergence = kl it has 0.05.
    """

    name: Literal["dppo"] = Field(default="dppo", description=_NAME)
    threshold_low: float = Field(
        default=0.2,
        ge=0,
        description="Largest divergence of a token with a negative advantage whose probability has fallen.",
    )
    threshold_high: float = Field(
        default=0.2,
        ge=0,
        description="Largest divergence of a token with a positive advantage whose probability has risen.",
    )
    largest_ratio: float | None = Field(
        default=20.0,
        ge=1,
        description="The importance ratio is limited to this value; null means no limit. The default is that of the "
        "authors' implementation in verl; the paper warns of small values.",
    )


class CppoConfig(TrustRegionSection):
    """CPPO, arXiv:2606.10968: DPPO with a position-weighted threshold and a budget for the divergence of the prefix.

    The defaults are those of the paper's dense models; for Qwen3-30B-A3B it has threshold = 0.2. With divergence = kl
    it has threshold = 0.1 and budget = 0.002.
    """

    name: Literal["cppo"] = Field(default="cppo", description=_NAME)
    threshold: float = Field(default=0.15, ge=0, description="Largest weighted divergence of a token.")
    budget: float = Field(
        default=0.02,
        ge=0,
        description="Weighted mean of the divergences of the earlier tokens beyond which the threshold shrinks.",
    )
    smallest_weight: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Weight of the divergence of the last token of a response; that of the first is 1.",
    )
    horizon: int | None = Field(
        default=None,
        gt=0,
        description="Position, counted in trained tokens, at which the weight has reached smallest_weight; null means "
        "the last trained token of each response.",
    )


class TrmConfig(TrustRegionSection):
    """Trust region masking, arXiv:2512.23075: the ratio, without whole sequences that have left a trust region.

    The default is TRM-Max of the paper; its TRM-Avg has mean_divergence = 0.001, and both together 0.1 and 0.002.
    """

    name: Literal["trm"] = Field(default="trm", description=_NAME)
    divergence: Divergence = Field(default="kl", description=_DIVERGENCE)
    max_divergence: float | None = Field(
        default=0.05,
        ge=0,
        description="Sequences in which the divergence of a token is larger are excluded; null means no limit.",
    )
    mean_divergence: float | None = Field(
        default=None,
        ge=0,
        description="Sequences in which the mean divergence of the tokens is larger are excluded; null means no limit.",
    )

    @model_validator(mode="after")
    def _has_a_limit(self) -> "TrmConfig":
        if self.max_divergence is None and self.mean_divergence is None:
            raise ValueError("max_divergence and mean_divergence are both null: trm needs one of them")
        return self


class SapoConfig(ObjectiveSection):
    """SAPO, arXiv:2511.20347: a sigmoid of the ratio in place of a clip."""

    name: Literal["sapo"] = Field(default="sapo", description=_NAME)
    aggregation: Aggregation = Field(default="sequence_mean", description=_AGGREGATION)
    temperature_positive: float = Field(
        default=1.0,
        gt=0,
        description="Temperature of the gate of tokens with a positive advantage; a larger one narrows the gate.",
    )
    temperature_negative: float = Field(
        default=1.05, gt=0, description="Temperature of the gate of all other tokens; a larger one narrows the gate."
    )


class VespoConfig(ObjectiveSection):
    """VESPO, arXiv:2602.10693: a smooth function of the product of a sequence's ratios as the weight of its tokens."""

    name: Literal["vespo"] = Field(default="vespo", description=_NAME)
    power_positive: float = Field(
        default=2.0, ge=0, description="Power of the product in the weight of sequences with an advantage of 0 or more."
    )
    decay_positive: float = Field(
        default=3.0, gt=0, description="Exponential decay in the weight of sequences with an advantage of 0 or more."
    )
    power_negative: float = Field(
        default=3.0, ge=0, description="Power of the product in the weight of sequences with a negative advantage."
    )
    decay_negative: float = Field(
        default=2.0, gt=0, description="Exponential decay in the weight of sequences with a negative advantage."
    )


class PnpoConfig(ObjectiveSection):
    """PNPO, arXiv:2608.01418: the geometric mean of the ratios up to a token as its weight."""

    name: Literal["pnpo"] = Field(default="pnpo", description=_NAME)
    smallest_weight: float | None = Field(
        default=None, ge=0, description="Tokens with a smaller weight are excluded; null means no limit."
    )
    largest_weight: float | None = Field(
        default=None, gt=0, description="Tokens with a larger weight are excluded; null means no limit."
    )

    @model_validator(mode="after")
    def _limits_are_in_order(self) -> "PnpoConfig":
        low, high = self.smallest_weight, self.largest_weight
        if low is not None and high is not None and low > high:
            raise ValueError(f"smallest_weight = {low} must not exceed largest_weight = {high}")
        return self


class P3oConfig(ObjectiveSection):
    """P3O, arXiv:2605.12380: the ratio, capped at the effective sample size of the mini-batch's ratios, and a KL term
    whose factor is what that lacks to 1. It has no setting of its own."""

    surveys_mini_batch: ClassVar[bool] = True
    name: Literal["p3o"] = Field(default="p3o", description=_NAME)


class SatConfig(ObjectiveSection):
    """SAT, arXiv:2607.18722: PPO's clip, contracted where a ratio lies in the tail of the mini-batch.

    The defaults are the authors', for ratio = token and ratio = sequence alike. They do not say how they average.
    """

    surveys_mini_batch: ClassVar[bool] = True
    name: Literal["sat"] = Field(default="sat", description=_NAME)
    ratio: Literal["token", "sequence"] = Field(
        default="token",
        description="Ratio that is clipped: that of each token (SAT-GRPO), or the geometric mean of the ratios of its "
        "sequence (SAT-GSPO).",
    )
    clip_low: float = Field(
        default=0.2, ge=0, le=1, description="The lower bound of a ratio outside the tail is 1 - clip_low."
    )
    clip_high: float = Field(
        default=0.2, ge=0, description="The upper bound of a ratio outside the tail is 1 + clip_high."
    )
    quantile: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="Share of the mini-batch's tokens, those of the smallest absolute log-ratios, outside the tail.",
    )


class CtpoSection(ObjectiveSection):
    """What both forms of CTPO share: bounds whose logarithms are multiples of a power of the position t."""

    aggregation: Aggregation = Field(default="sequence_mean", description=_AGGREGATION)
    log_clip_low: float = Field(
        default=0.025,
        ge=0,
        description="The lower bound at token t is exp(-log_clip_low * t^position_exponent).",
    )
    log_clip_high: float = Field(
        default=0.05, ge=0, description="The upper bound at token t is exp(log_clip_high * t^position_exponent)."
    )
    log_dual_clip: float = Field(
        default=0.05,
        ge=0,
        description="The upper bound at tokens with a negative advantage is exp(log_dual_clip * t^position_exponent).",
    )
    position_exponent: float = Field(
        default=0.5,
        ge=-1,
        le=1,
        description="Power of the position t in the bounds; 0 gives every token the same ones.",
    )
    log_clamp: float | None = Field(
        default=None,
        gt=0,
        description="The log of the clipped value is clamped to this absolute value, in nats; null means no limit.",
    )

    @model_validator(mode="after")
    def _dual_clip_is_not_inside_the_clip(self) -> Self:
        if self.log_dual_clip < self.log_clip_high:
            raise ValueError(
                f"log_dual_clip = {self.log_dual_clip} must not be below log_clip_high = {self.log_clip_high}"
            )
        return self


class CtpoConfig(CtpoSection):
    """CTPO, arXiv:2605.07331: PPO's clip on the product of the ratios up to t, bounds growing with sqrt(t).

    The authors' code: aggregation = token_mean, log_clamp = 10.
    """

    name: Literal["ctpo"] = Field(default="ctpo", description=_NAME)


class CtpoGeomeanConfig(CtpoSection):
    """CTPO on the geometric mean of the ratios up to t, as in its authors' code: bounds shrinking with sqrt(t)."""

    name: Literal["ctpo_geomean"] = Field(default="ctpo_geomean", description=_NAME)
    position_exponent: float = Field(
        default=-0.5,
        ge=-1,
        le=1,
        description="Power of the position t in the bounds; 0 gives every token the same ones.",
    )


class SftConfig(ObjectiveSection):
    """Supervised fine-tuning on data.demonstrations: the mean negative log-prob of the responses' tokens."""

    compares_policies: ClassVar[bool] = False
    name: Literal["sft"] = Field(default="sft", description=_NAME)


class ImportedObjectiveConfig(ObjectiveSection):
    """Your own objective: a function `(PolicyTokens, settings) -> ObjectiveTerms` (docs/extending.md)."""

    name: str = Field(default="package.module:function", description="Import path of the function.")
    settings: dict[str, Any] = Field(default={}, description="Settings that the function receives as a dictionary.")


IMPORTED = "import path"


def objective_name(value: Any) -> str | None:
    """The objective that a section belongs to, by its name."""
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return IMPORTED if isinstance(name, str) and is_import_path(name) else name


ObjectiveConfig = Annotated[
    Annotated[MinproConfig, Tag("minpro")]
    | Annotated[CispoConfig, Tag("cispo")]
    | Annotated[GrpoConfig, Tag("grpo")]
    | Annotated[GspoConfig, Tag("gspo")]
    | Annotated[M2poConfig, Tag("m2po")]
    | Annotated[M2poWinsorizedConfig, Tag("m2po_winsorized")]
    | Annotated[CtpoConfig, Tag("ctpo")]
    | Annotated[CtpoGeomeanConfig, Tag("ctpo_geomean")]
    | Annotated[DppoConfig, Tag("dppo")]
    | Annotated[CppoConfig, Tag("cppo")]
    | Annotated[TrmConfig, Tag("trm")]
    | Annotated[SapoConfig, Tag("sapo")]
    | Annotated[VespoConfig, Tag("vespo")]
    | Annotated[PnpoConfig, Tag("pnpo")]
    | Annotated[P3oConfig, Tag("p3o")]
    | Annotated[SatConfig, Tag("sat")]
    | Annotated[PrefixRatioConfig, Tag("prefix_ratio")]
    | Annotated[PrefixFilterConfig, Tag("prefix_filter")]
    | Annotated[ScaledCispoConfig, Tag("scaled_cispo")]
    | Annotated[ShuffledMinproConfig, Tag("shuffled_minpro")]
    | Annotated[SftConfig, Tag("sft")]
    | Annotated[ImportedObjectiveConfig, Tag(IMPORTED)],
    Field(discriminator=Discriminator(objective_name)),
]
