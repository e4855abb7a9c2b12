"""The definition of a correct response by its reward.

Training accuracy, pass@k, the display, reports, tables and `eval` all use it. They show the mean reward in addition.
"""

RIGHT_REWARD = 1.0  # the reward of a correct response from every grader of this project


def is_right(reward: float | None, right_reward: float) -> bool:
    """Whether a response with this reward counts as correct: the reward is at least `right_reward`
    (collector.right_reward). A response that could not be graded (None, NaN) does not count as correct.

    >>> is_right(1.0, RIGHT_REWARD), is_right(0.5, RIGHT_REWARD), is_right(None, RIGHT_REWARD)
    (True, False, False)
    """
    return reward is not None and reward >= right_reward
