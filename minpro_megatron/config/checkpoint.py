"""What a run keeps so that it can go on after a crash, and the best weights it has seen."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section


class CheckpointConfig(Section):
    """Checkpoints in `run_dir/checkpoints`: weights, optimizer state and a manifest. A run that ended early goes on
    from the last one when it is launched again."""

    every_steps: int = Field(default=10, ge=0, description="global steps between two checkpoints; 0: none are written")
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept to go on from; older ones are removed")
    keep_best: int = Field(default=1, ge=0, description="checkpoints kept for their held-out evaluation, beside those")
    keep_best_by: Literal["mean_reward", "accuracy"] = Field(
        default="mean_reward",
        description="what of that evaluation decides; with rewards of 0 and 1 they are the same",
    )
    asynchronous: bool = Field(default=True, description="write files while training goes on, from a copy")
