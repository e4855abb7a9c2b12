"""Running a part of the system alone, and catching a part that hangs."""

from typing import Literal

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section


class DebugConfig(Section):
    """The defaults are those of a real run."""

    trainer: Literal["megatron", "timer"] = Field(
        default="megatron",
        description="timer: in the trainer's place something that takes batches, waits and publishes nothing: to size "
        "the servers, or to collect rollouts of the initial weights alone",
    )
    timer_step_s: float = Field(default=0, ge=0, description="how long a global step takes the timer")
    journal: str = Field(
        default="",
        description="journal.sqlite of another run: train on its groups and scores, without servers and collector",
    )
    hang_timeout_s: float = Field(
        default=1800,
        gt=0,
        description="a rank whose update, scoring pass, publication or checkpoint takes longer, or a collector that "
        "does not react for as long, writes the stacks of its threads into run_dir/logs and ends",
    )

    @model_validator(mode="after")
    def _one_part_alone(self) -> "DebugConfig":
        if self.trainer == "timer" and self.journal:
            raise ValueError(
                f"debug.trainer = timer takes batches from servers, and debug.journal = {self.journal} trains without "
                "them: set only one of the two"
            )
        return self
