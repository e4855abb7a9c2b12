"""Groups that could not be graded: how many there are, and when the run ends because of them.

Such a group is dropped, like a group of equal rewards under batch.dynamic_sampling: the journal marks it as dropped,
with NULL for the missing rewards, and another prompt is sampled in its place.
"""

from minpro_megatron.records import CollectedGroup

MAX_GROUPS_IN_A_ROW = 32


class GradingError(RuntimeError):
    """The grader fails for every response; the message is one line with its last failure and a remedy."""


class GradingWatch:
    """`num_groups` counts the groups with missing rewards since the start."""

    def __init__(self, num_prompts: int) -> None:
        """`num_prompts` is the number of groups that a global step consumes."""
        self._limit = min(num_prompts, MAX_GROUPS_IN_A_ROW)
        self._in_a_row = 0
        self.num_groups = 0

    def collected(self, group: CollectedGroup) -> None:
        """Counts a group that was sampled for training. Raises GradingError if neither this group nor those before it
        could be graded, over one step's groups or MAX_GROUPS_IN_A_ROW, whichever is smaller."""
        if not group.grading_problem:
            self._in_a_row = 0
            return
        self.num_groups += 1
        self._in_a_row += 1
        if self._in_a_row >= self._limit:
            raise GradingError(
                f"{self._in_a_row} groups in a row could not be graded, the last one of prompt "
                f"{group.issued.prompt.id!r}: {group.grading_problem}; {_remedy(group)}"
            )


def _remedy(group: CollectedGroup) -> str:
    turns = (turn for response in group.responses for turn in response.turns)
    if any(turn.problem == group.grading_problem for turn in turns):
        return "correct the code of the environment (environment.name) and launch the same command again"
    return (
        f"correct the grader of source {group.issued.prompt.source!r} (reward.function, reward.by_source), or start "
        "its service again (reward.urls), and launch the same command again; another grader, or other answers in "
        "data.train_file, need a new name=..."
    )
