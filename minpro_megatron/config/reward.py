"""The reward: how responses are graded, and from which reward on a response counts as correct.

Training accuracy, pass@k, the display, reports, tables and `eval` all use this definition of a correct response. They
show the mean reward in addition.
"""

from pydantic import Field

from minpro_megatron.config.base import Section

RIGHT_REWARD = 1.0  # the reward of a correct response from every grader of this project


class RewardConfig(Section):
    """The reward: the graders of the responses, their limits, and when a response counts as correct."""

    function: str = Field(
        default="calculator",
        description="Grader of the responses: calculator, dapo, dapo_boxed, math, or your own function as "
        "package.module:function.",
    )
    by_source: dict[str, str] = Field(
        default={},
        description="Other graders for the prompts of some sources, by the source that the prompt files state.",
    )
    right_reward: float = Field(
        default=RIGHT_REWARD,
        description="A response with at least this reward counts as correct, in the training accuracy and in every "
        "evaluation. The graders named under function give 1 for a correct response.",
    )
    timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="Limit in seconds of processor time for grading one response; the limit of wall time is ten times "
        "as long. If a response cannot be graded in two attempts, its group is excluded from training.",
    )
    workers: int = Field(default=1, ge=1, description="Number of processes that grade responses.")


def is_right(reward: float | None, right_reward: float) -> bool:
    """Whether a response with this reward counts as correct: the reward is at least `right_reward`
    (reward.right_reward). A response that could not be graded (None, NaN) does not count as correct.

    >>> is_right(1.0, RIGHT_REWARD), is_right(0.5, RIGHT_REWARD), is_right(None, RIGHT_REWARD)
    (True, False, False)
    """
    return reward is not None and reward >= right_reward
