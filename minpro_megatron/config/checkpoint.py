"""When a run saves checkpoints, and which of them it keeps."""

from typing import Literal

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section


class CheckpointConfig(Section):
    """Checkpoints in `run_dir/checkpoints`: weights, optimizer state and a manifest. A run that ended early
    resumes from the last one when it is launched again.

    A checkpoint is saved at the end of a global step, when `every_steps` or `every_minutes` requires it, whichever
    comes first. The run also saves before a job's time limit and after a request to stop, unless both settings are
    0."""

    every_steps: int = Field(default=10, ge=0, description="Save after every this many global steps; 0 turns this off.")
    every_minutes: float = Field(
        default=0.0,
        ge=0,
        description="Save at the end of a global step when the last save is at least this many minutes old; 0 turns "
        "this off.",
    )
    at_end: bool = Field(
        default=True, description="Save after the last global step, so that the run can be extended afterwards."
    )
    time_limit_minutes: float = Field(
        default=0.0,
        ge=0,
        description="Time limit of one start of the run, in minutes. The run saves after the last global step that "
        "fits, and ends with exit status 75. With 0 only the time limit of its Slurm job applies, if there is one.",
    )
    save_on_stop_s: float = Field(
        default=0.0,
        ge=0,
        description="Time in seconds that the run may take after Ctrl-C or SIGTERM to finish its global step and to "
        "save. A second signal ends it at once; with 0 the first one does. After scancel or a preemption a job has "
        "only Slurm's KillWait or GraceTime, whatever this setting says.",
    )
    keep_last: int = Field(
        default=2,
        ge=1,
        description="Number of latest checkpoints that are kept to resume from; older ones are removed.",
    )
    keep_best: int = Field(
        default=1,
        ge=0,
        description="Number of checkpoints that are kept for the best held-out evaluation, in addition to keep_last.",
    )
    keep_best_by: Literal["mean_reward", "accuracy"] = Field(
        default="mean_reward",
        description="Score of the evaluation by which keep_best chooses. With rewards of 0 and 1 both are the same.",
    )
    asynchronous: bool = Field(
        default=True, description="Write the files while training continues, from a copy in host memory."
    )

    @property
    def saves_before_end(self) -> bool:
        """Whether checkpoints are saved before the end of the run."""
        return self.every_steps > 0 or self.every_minutes > 0

    @model_validator(mode="after")
    def _limits_have_checkpoints(self) -> "CheckpointConfig":
        for name in ("time_limit_minutes", "save_on_stop_s"):
            if getattr(self, name) and not self.saves_before_end:
                raise ValueError(
                    f"{name} = {getattr(self, name):g} has no effect while every_steps = 0 and every_minutes = 0 "
                    f"switch checkpoints off: set one of them, or {name} to 0"
                )
        return self
