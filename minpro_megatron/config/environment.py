"""The environment of the episodes: what answers the policy between its turns."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section

NO_ENVIRONMENT = "none"


class EnvironmentConfig(Section):
    """What answers the policy's turns in an episode. The answers are given tokens: no loss sees them."""

    name: str = Field(
        default=NO_ENVIRONMENT,
        description="Environment: none (a response is one turn), or your own class as package.module:Class.",
    )
    role: Literal["tool", "user"] = Field(
        default="tool", description="Role of the answers in the model's chat template."
    )
    timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Limit in seconds for one answer. If there is none by then, or the environment raises an error, "
        "the group is excluded from training.",
    )
    max_answer_tokens: int = Field(
        default=4096, ge=1, description="Maximum length of an answer in tokens; the rest of its text is cut."
    )

    @property
    def enabled(self) -> bool:
        return self.name != NO_ENVIRONMENT
