"""An environment that fails for every group ends the run, with a line that names it and not the grader."""

import msgspec
import pytest

from minpro_megatron.collector.grading_watch import GradingError, GradingWatch
from minpro_megatron.records import NOT_GRADED, CollectedGroup, Turn
from tests.support.batches import make_group

PROBLEM = "the environment raised KeyError: 'tool'"


def failed_group(turn_problem: str) -> CollectedGroup:
    group = make_group(1, 3, [NOT_GRADED], [5])
    turns = [Turn(sampled_tokens=5, problem=turn_problem)]
    response = msgspec.structs.replace(group.responses[0], turns=turns)
    return msgspec.structs.replace(group, responses=[response], grading_problem=PROBLEM)


@pytest.mark.parametrize(
    ("turn_problem", "remedy"),
    [(PROBLEM, "the code of the environment .environment.name."), ("", "the grader of source 'test'")],
)
def test_the_line_names_what_to_correct(turn_problem: str, remedy: str) -> None:
    watch = GradingWatch(2)
    watch.collected(failed_group(turn_problem))
    with pytest.raises(GradingError, match=f"2 groups in a row .*{PROBLEM}; correct {remedy}"):
        watch.collected(failed_group(turn_problem))
