"""The reward: how responses are graded, and from which reward on a response counts as correct.

Training accuracy, pass@k, the display, reports, tables and `eval` all use this definition of a correct response. They
show the mean reward in addition.
"""

from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section

RIGHT_REWARD = 1.0  # the reward of a correct response from every grader of this project


class RewardConfig(Section):
    """The reward: the graders of the responses, their limits, and when a response counts as correct."""

    function: str = Field(
        default="calculator",
        description="Grader of the responses: calculator, dapo, dapo_boxed, math, your own function as "
        "package.module:function, or http for the services of reward.urls.",
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
        "as long. If a response cannot be graded in two attempts, its group is excluded from training. Services and "
        "async functions have attempt_timeout_s and deadline_s instead.",
    )
    workers: int = Field(
        default=1,
        ge=1,
        description="Number of processes that grade responses. Async functions share one process of their own.",
    )
    urls: list[str] = Field(
        default=[],
        description="Services that grade where function or by_source says http. A group is posted to the one with the "
        "fewest groups under way.",
    )
    concurrency: int = Field(
        default=64,
        ge=1,
        description="Largest number of groups that services and async functions grade at the same time.",
    )
    attempt_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Limit in seconds for one request to a service, or one call of an async function.",
    )
    deadline_s: float = Field(
        default=600.0,
        gt=0,
        description="Limit in seconds for grading a group by a service or an async function. Failed attempts are "
        "repeated until then; after it the group is excluded from training.",
    )

    @property
    def names(self) -> list[str]:
        """All graders, each once: `function` first."""
        return list(dict.fromkeys([self.function, *self.by_source.values()]))

    @model_validator(mode="after")
    def _services_are_given(self) -> Self:
        if "http" in self.names and not self.urls:
            raise ValueError('urls = []: function or by_source says http; give a service, such as ["http://host:80/"]')
        for url in self.urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"urls: {url!r} is not the address of a service, such as http://host:8000/grade")
        return self


def is_right(reward: float | None, right_reward: float) -> bool:
    """Whether a response with this reward counts as correct: the reward is at least `right_reward`
    (reward.right_reward). A response that could not be graded (None, NaN) does not count as correct.

    >>> is_right(1.0, RIGHT_REWARD), is_right(0.5, RIGHT_REWARD), is_right(None, RIGHT_REWARD)
    (True, False, False)
    """
    return reward is not None and reward >= right_reward
