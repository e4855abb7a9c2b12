"""Running one part of the system alone, profiling, and the detection of parts that hang."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.config.path_type import OtherPath

_STEPS = r"^([0-9]{1,9}:[0-9]{1,9})?$"


class DebugConfig(Section):
    """Settings for debugging; the defaults are those of a normal run."""

    trainer: Literal["megatron", "timer"] = Field(
        default="megatron",
        description="Kind of trainer. timer replaces the trainer by a process that takes batches, waits and publishes "
        "nothing, to size the servers or to collect rollouts of the initial weights.",
    )
    timer_step_s: float = Field(default=0, ge=0, description="Duration in seconds of a global step of the timer.")
    journal: OtherPath = Field(
        default="",
        description="Path of the journal.sqlite of another run: the trainer trains on its groups and scores, without "
        "servers and without a collector.",
    )
    hang_timeout_s: float = Field(
        default=1800,
        gt=0,
        description="Limit in seconds of an update, a scoring pass, a publication and a checkpoint of a rank, and of "
        "the time for which the collector does not react. A process that exceeds it writes the stacks of its threads "
        "into run_dir/logs and ends. Collectives and the trainer's requests to the collector time out two minutes "
        "after this limit.",
    )

    trace_steps: str = Field(
        default="",
        pattern=_STEPS,
        description="Global steps of which run_dir/trace.json holds a timeline of all roles, such as 10:13 for steps "
        "10 to 13.",
    )
    profile_steps: str = Field(
        default="",
        pattern=_STEPS,
        description="Global steps of which torch.profiler writes traces into run_dir/profiles, such as 10:11.",
    )
    profile_ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0,), description="The trainer's ranks for which profile_steps writes traces."
    )

    @property
    def traced(self) -> range:
        """The global steps of trace_steps."""
        return _steps(self.trace_steps)

    @property
    def profiled(self) -> range:
        """The global steps of profile_steps."""
        return _steps(self.profile_steps)

    @field_validator("trace_steps", "profile_steps")
    @classmethod
    def _in_order(cls, steps: str) -> str:
        if steps and not _steps(steps):
            raise ValueError("the first global step must not be after the last one: give FIRST:LAST, such as 10:13")
        return steps

    @model_validator(mode="after")
    def _one_part_alone(self) -> "DebugConfig":
        if self.trainer == "timer" and self.journal:
            raise ValueError(
                f"debug.trainer = timer takes batches from servers, and debug.journal = {self.journal} trains without "
                "them: set only one of the two"
            )
        return self


def _steps(text: str) -> range:
    """The global steps of FIRST:LAST, both included; an empty range for an empty text."""
    first, _, last = text.partition(":")
    return range(int(first), int(last) + 1) if text else range(0)
