"""What a run keeps so that it can go on after a crash, and the best weights it has seen."""

from typing import Literal

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section


class CheckpointConfig(Section):
    """Checkpoints in `run_dir/checkpoints`: weights, optimizer state and a manifest. A run that ended early goes on
    from the last one when it is launched again.

    A checkpoint is saved at the end of a global step, when `every_steps` or `every_minutes` says so, whichever comes
    first. A job's time limit and a request to stop save as well, unless both of these are 0."""

    every_steps: int = Field(default=10, ge=0, description="save after each multiple of this global step; 0: off")
    every_minutes: float = Field(
        default=0.0, ge=0, description="save at the end of a global step when the last save is this old; 0: off"
    )
    at_end: bool = Field(
        default=True, description="save after the last global step, so that the run can be made longer afterwards"
    )
    time_limit_minutes: float = Field(
        default=0.0,
        ge=0,
        description="time limit of one start, counted from its beginning: the run saves after the last global step "
        "that fits, and ends with exit status 75; 0: no limit but that of the Slurm job in which it runs",
    )
    save_on_stop_s: float = Field(
        default=0.0,
        ge=0,
        description="after Ctrl-C or SIGTERM the run may take this long to finish its global step and to save; a "
        "second signal ends it at once; 0: the first one does",
    )
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept to go on from; older ones are removed")
    keep_best: int = Field(default=1, ge=0, description="checkpoints kept for their held-out evaluation, beside those")
    keep_best_by: Literal["mean_reward", "accuracy"] = Field(
        default="mean_reward",
        description="what of that evaluation decides; with rewards of 0 and 1 they are the same",
    )
    asynchronous: bool = Field(
        default=True, description="write files while training goes on, from a copy in host memory"
    )

    @property
    def saves_before_end(self) -> bool:
        """Whether checkpoints are saved while the run is under way."""
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
