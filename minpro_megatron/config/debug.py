"""Running a part of the system alone, looking at where time goes, and catching a part that hangs."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from minpro_megatron.config.base import Section

_STEPS = r"^([0-9]{1,9}:[0-9]{1,9})?$"


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
        "does not react for as long, writes the stacks of its threads into run_dir/logs and ends; collectives and the "
        "trainer's requests to the collector time out after it, two minutes later",
    )

    trace_steps: str = Field(
        default="",
        pattern=_STEPS,
        description="such as 10:13: a timeline of all roles during global steps 10 to 13, as run_dir/trace.json",
    )
    profile_steps: str = Field(
        default="",
        pattern=_STEPS,
        description="such as 10:11: torch.profiler's traces of these global steps, in run_dir/profiles",
    )
    profile_ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0,), description="the trainer's ranks that profile_steps is about"
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
    """The global steps of FIRST:LAST, both included; none for an empty text."""
    first, _, last = text.partition(":")
    return range(int(first), int(last) + 1) if text else range(0)
