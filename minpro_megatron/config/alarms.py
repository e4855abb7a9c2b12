"""When a run reports that something is going wrong, and whether it then stops."""

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
    "transport",
    "staleness_at_bound",
    "server_loss",
    "failed_evaluation",
]


class AlarmsConfig(Section):
    """Thresholds of the alarms (monitor/alarms.py); null turns an alarm off.

    An alarm is a warning: it is written to the trainer's log, the display, alarms.jsonl and TensorBoard. The run ends
    only for the alarms named in `stop_on`, with a checkpoint from which it can resume.
    """

    window_steps: int = Field(
        default=10,
        ge=2,
        description="Number of global steps over which a metric is averaged before it is compared with its threshold. "
        "No average is compared before this many steps exist.",
    )
    entropy_collapse_nats: float | None = Field(
        default=0.03,
        ge=0,
        description="The alarm entropy_collapse is raised when the mean entropy per token, in nats, is below this.",
    )
    entropy_explosion_factor: float | None = Field(
        default=3.0,
        gt=1,
        description="The alarm entropy_explosion is raised when the mean entropy per token exceeds this multiple of "
        "the run's lowest average, and exceeds it by more than 0.3 nats.",
    )
    reward_drop: float | None = Field(
        default=0.3,
        gt=0,
        le=1,
        description="Largest allowed fall of reward/mean from its peak, as a share of the distance between the peak "
        "and the lowest reward so far. A fall of less than 3 % of the range of all rewards raises no alarm.",
    )
    equal_groups: float | None = Field(
        default=1.0,
        gt=0,
        le=1,
        description="The alarm no_gradient is raised when, in each of the last window_steps steps, at least this share "
        "of the groups has equal rewards, which give no gradient.",
    )
    failed_grades: int | None = Field(
        default=10,
        ge=1,
        description="The alarm failed_grades is raised when, within window_steps, at least this many responses could "
        "not be graded because the grader failed or exceeded its time.",
    )
    gradient_spike_factor: float | None = Field(
        default=10.0,
        gt=1,
        description="A gradient norm above this multiple of the median of the steps before it is a spike. Three spikes "
        "within window_steps raise an alarm; with a window of two steps, two do.",
    )
    effective_sample_size: float | None = Field(
        default=0.3,
        gt=0,
        le=1,
        description="The alarm effective_sample_size is raised when the average of objective/effective_sample_size is "
        "below this share.",
    )
    mismatch_kl_nats: float | None = Field(
        default=0.02,
        gt=0,
        description="The alarm mismatch is raised when KL(server || trainer) per token under the same weights, in "
        "nats, exceeds this.",
    )
    canary_nats: float | None = Field(
        default=0.1,
        gt=0,
        description="Largest allowed mean absolute difference, in nats, between a server's and the trainer's log-probs "
        "of the canaries. canary_factor allows more where the run's first publication already differed.",
    )
    canary_factor: float = Field(
        default=3.0,
        ge=1,
        description="The difference of the canaries may be this multiple of that of the run's first publication, if "
        "this is more than canary_nats.",
    )
    staleness_share_of_bound: float | None = Field(
        default=0.95,
        gt=0,
        le=1,
        description="With staleness.mode = bounded, an alarm is raised when the mean staleness of the batch is at "
        "least this share of staleness.max_staleness in each of the last window_steps steps.",
    )
    lost_servers: int | None = Field(
        default=1,
        ge=1,
        description="The alarm server_loss is raised when at least this many servers are missing, or were restarted "
        "since the previous step.",
    )
    stop_on: list[AlarmName] = Field(
        default=[],
        description='Alarms that end the run, with a checkpoint and exit status 1, such as ["not_finite", "mismatch"].',
    )
