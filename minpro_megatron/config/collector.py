"""The collector: its HTTP interface, the reward, and what the journal keeps."""

from pydantic import Field

from minpro_megatron.config.base import Section
from minpro_megatron.config.rewards import RIGHT_REWARD


class CollectorConfig(Section):
    """The collector: its HTTP interface, which only the trainer's rank 0 uses, the rewards and the journal."""

    host: str = Field(
        default="127.0.0.1",
        description="Address on which the collector listens. The default, loopback, is not reachable from other "
        "machines.",
    )
    port: int = Field(default=0, ge=0, le=65535, description="Port of the collector; 0 selects a free port.")
    reward: str = Field(
        default="calculator",
        description="Grader of the responses: calculator, dapo, dapo_boxed, math, or your own function as "
        "package.module:function.",
    )
    reward_by_source: dict[str, str] = Field(
        default={},
        description="Other graders for the prompts of some sources, by the source that the prompt files state.",
    )
    right_reward: float = Field(
        default=RIGHT_REWARD,
        description="A response with at least this reward counts as correct, in the training accuracy and in every "
        "evaluation. The graders named under reward give 1 for a correct response.",
    )
    reward_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="Limit in seconds of processor time for grading one response; the limit of wall time is ten times "
        "as long. If a response cannot be graded in two attempts, its group is excluded from training.",
    )
    reward_workers: int = Field(default=1, ge=1, description="Number of processes that grade responses.")
    journal_ratios: bool = Field(
        default=True,
        description="Also store the log-prob of each token under the policy at the update, which takes 4 bytes per "
        "token.",
    )
    journal_keep_steps: int = Field(
        default=50,
        ge=0,
        description="Number of latest global steps whose tokens and log-probs stay in the journal; 0 keeps all.",
    )
    journal_keep_routes: bool = Field(
        default=False,
        description="With model.routing_replay = rollout: keep the servers' routes as long as the tokens, to train on "
        "the journal again (debug.journal) or to resume from an earlier checkpoint than the latest. false: they are "
        "removed when a checkpoint includes the step that consumed them.",
    )
