"""An example of a grader: `reward.function=docs.examples.reward:grade`.

tests/unit/repository/test_examples.py loads it as a run does and grades with it.
"""

import re

_LAST_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def grade(response: str, answer: str) -> float:
    """1.0 if the last number in the response equals the answer, else 0.0.

    A grader must return a finite number for every text. A response is untrusted: it may be empty, very long, or
    contain anything. Raising an error means that the response could not be graded, not that it is wrong.
    """
    numbers = _LAST_NUMBER.findall(response)
    return 1.0 if numbers and float(numbers[-1]) == float(answer) else 0.0
