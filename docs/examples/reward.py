"""Examples of graders: `reward.function=docs.examples.reward:grade`, or `...:grade_group`.

tests/unit/repository/test_examples.py loads them as a run does and grades with them.
"""

import re

from minpro_megatron.rewards.forms import GroupToGrade

_LAST_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def grade(response: str, answer: str) -> float:
    """1.0 if the last number in the response equals the answer, else 0.0.

    A grader must return a finite number for every text. A response is untrusted: it may be empty, very long, or
    contain anything. Raising an error means that the response could not be graded, not that it is wrong.
    """
    numbers = _LAST_NUMBER.findall(response)
    return 1.0 if numbers and float(numbers[-1]) == float(answer) else 0.0


def grade_group(group: GroupToGrade) -> list[float]:
    """As `grade`, with the tolerance that the row's metadata may state. A correct response that was cut off at the
    length limit gets half: it has the answer, but did not stop.
    """
    tolerance = (group.metadata or {}).get("tolerance", 0.0)
    rewards = []
    for response in group.responses:
        numbers = _LAST_NUMBER.findall(response.text)
        correct = bool(numbers) and abs(float(numbers[-1]) - float(group.answer)) <= tolerance
        rewards.append((0.5 if response.finish_reason == "length" else 1.0) if correct else 0.0)
    return rewards
