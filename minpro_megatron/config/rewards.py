"""What a reward says about a response: the one definition of a right response.

Training accuracy, pass@k, the display, reports, tables and `eval` all ask here. Rewards themselves are shown beside it
as mean reward.
"""

RIGHT_REWARD = 1.0  # what all graders of this project give a right response


def is_right(reward: float | None, right_reward: float) -> bool:
    """Whether a response of this reward counts as right: from `right_reward` on (collector.right_reward). One that
    could not be graded (None, NaN) does not.

    >>> is_right(1.0, RIGHT_REWARD), is_right(0.5, RIGHT_REWARD), is_right(None, RIGHT_REWARD)
    (True, False, False)
    """
    return reward is not None and reward >= right_reward
