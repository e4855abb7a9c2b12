"""How old the rollouts may be that a step trains on."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section


class StalenessConfig(Section):
    """How many policy versions the weights that sample may be behind those that train.

    `delay`: batch k is sampled with version max(0, k - delay_steps) and consumed at global step k, so every token has
    exactly this staleness. `bounded`: servers never wait; weights change while responses are in progress, and a group
    is consumed only while none of its tokens is older than `max_staleness`.
    """

    mode: Literal["delay", "bounded"] = Field(
        default="delay",
        description="Rule of staleness. delay: every token has the staleness delay_steps. bounded: servers sample "
        "continuously, and no token is staler than max_staleness.",
    )
    delay_steps: int = Field(
        default=2, ge=0, description="With mode = delay: staleness of every token in global steps."
    )
    max_staleness: int = Field(
        default=2, ge=1, description="With mode = bounded: maximum staleness of a token in global steps."
    )
    behavior_log_probs: Literal["trainer", "rollout"] = Field(
        default="trainer",
        description="Source of the behavior log-probs. trainer: the trainer computes them with the weights that "
        "sampled the token. rollout: those of the servers, which saves the scoring pass but puts the engine mismatch "
        "into every ratio; prefix minima are very sensitive to it.",
    )
