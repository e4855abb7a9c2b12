"""When a run says that something is going wrong, and whether it then stops."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section

AlarmName = Literal[
    "not_finite",
    "entropy_collapse",
    "entropy_explosion",
    "reward_drop",
    "no_gradient",
    "failed_grades",
    "gradient_spikes",
    "effective_sample_size",
    "mismatch",
    "canary",
    "staleness_at_bound",
    "server_loss",
    "failed_evaluation",
]


class AlarmsConfig(Section):
    """Thresholds of the alarms (monitor/alarms.py); null turns one off.

    An alarm is a warning: it goes to the trainer's log, the display, alarms.jsonl and TensorBoard. The run ends only
    for those named in `stop_on`, with a checkpoint to go on from.
    """

    window_steps: int = Field(
        default=10,
        ge=2,
        description="global steps that a figure is averaged over before it is compared; none is while there are fewer",
    )
    entropy_collapse_nats: float | None = Field(default=0.03, ge=0, description="least entropy of a token")
    entropy_explosion_factor: float | None = Field(
        default=3.0, gt=1, description="most entropy, in multiples of the least so far (and 0.3 nats above it)"
    )
    reward_drop: float | None = Field(
        default=0.3,
        gt=0,
        le=1,
        description="largest fall of reward/mean from its peak, as a share of the peak's height above the lowest "
        "reward so far (and by at least 3 % of the distance between the lowest and the highest reward)",
    )
    equal_groups: float | None = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of groups with equal rewards, which give no gradient, that must not be reached in all of "
        "window_steps",
    )
    failed_grades: int | None = Field(
        default=10, ge=1, description="responses within window_steps whose grade failed or took too long"
    )
    gradient_spike_factor: float | None = Field(
        default=10.0,
        gt=1,
        description="a step's gradient norm above so many times the median of the steps before it is a spike; three of "
        "them within window_steps (all, where these are fewer) raise the alarm",
    )
    effective_sample_size: float | None = Field(
        default=0.3, gt=0, le=1, description="least objective/effective_sample_size"
    )
    mismatch_kl_nats: float | None = Field(
        default=0.02, gt=0, description="largest KL(server || trainer) a token under the same weights"
    )
    canary_nats: float | None = Field(
        default=0.1,
        gt=0,
        description="largest mean difference between a server's and the trainer's log-probs of the canaries, where the "
        "first publication showed no more",
    )
    canary_factor: float = Field(
        default=3.0, ge=1, description="else: as many times what the first publication of the run showed"
    )
    staleness_share_of_bound: float | None = Field(
        default=0.95,
        gt=0,
        le=1,
        description="mode bounded: mean staleness of a batch, as a share of staleness.max_staleness, that must not be "
        "reached in all of window_steps",
    )
    lost_servers: int | None = Field(
        default=1, ge=1, description="servers that are missing, or were restarted since the step before"
    )
    stop_on: list[AlarmName] = Field(
        default=[],
        description='alarms that end the run, with a checkpoint and exit status 1, such as ["not_finite", "mismatch"]',
    )
