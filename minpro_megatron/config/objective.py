"""The settings of each policy objective; the objective's name selects its section."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section

Aggregation = Literal["token_mean", "sequence_mean"]


class MinproConfig(Section):
    """MinPRO, arXiv:2601.22718: clip(prefix_min_t * ratio_t, 1 - clip_low, 1 + clip_high), Table 3's values."""

    name: Literal["minpro"] = "minpro"
    clip_low: float = Field(default=1.0, ge=0, le=1)
    clip_high: float = Field(default=4.0, ge=0)
    aggregation: Aggregation = "token_mean"


class CispoConfig(Section):
    """CISPO, arXiv:2506.13585: clip(ratio_t, 1 - clip_low, 1 + clip_high)."""

    name: Literal["cispo"] = "cispo"
    clip_low: float = Field(default=1.0, ge=0, le=1)
    clip_high: float = Field(default=4.0, ge=0)
    aggregation: Aggregation = "token_mean"


class GrpoConfig(Section):
    """GRPO with DAPO's asymmetric clip and dual clip, arXiv:2402.03300 and arXiv:2503.14476."""

    name: Literal["grpo"] = "grpo"
    clip_low: float = Field(default=0.2, ge=0, le=1)
    clip_high: float = Field(default=0.28, ge=0)
    dual_clip: float = Field(default=10.0, gt=1)
    aggregation: Aggregation = "token_mean"

    @model_validator(mode="after")
    def _dual_clip_is_beyond_the_clip(self) -> "GrpoConfig":
        if self.dual_clip <= 1 + self.clip_high:
            raise ValueError(f"dual_clip = {self.dual_clip} must exceed 1 + clip_high = {1 + self.clip_high}")
        return self


ObjectiveConfig = Annotated[MinproConfig | CispoConfig | GrpoConfig, Field(discriminator="name")]
