"""The calculator task: one two-operand expression (`48/2=`), answered with an integer (`24`).

This file defines which expressions belong to the task, what their answers are, and how a response is graded. The
limits keep the task small enough for a tiny model to learn most of it in minutes and leave room for reinforcement
learning.
"""

import re
from collections.abc import Iterator

OPERATORS = "+-*/"
MAX_OPERAND = 30
MAX_ANSWER = 30
# Longer responses cannot be answers of this task; rejecting them early bounds the work per response.
MAX_RESPONSE_CHARS = 12

_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")


def evaluate(left: int, operator: str, right: int) -> int | None:
    """The exact integer value of `left operator right`; None for an inexact division or a division by zero.

    Raises ValueError for an unknown operator. Example: `evaluate(48, "/", 2) == 24`, `evaluate(1, "/", 2) is None`.
    """
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    if operator == "/":
        return left // right if right != 0 and left % right == 0 else None
    raise ValueError(f"operator: {operator!r} is not one of {' '.join(OPERATORS)}")


def within_limits(left: int, right: int, answer: int) -> bool:
    """True if operands and answer are small enough for the task: 0..MAX_OPERAND and 0..MAX_ANSWER."""
    return 0 <= left <= MAX_OPERAND and 0 <= right <= MAX_OPERAND and 0 <= answer <= MAX_ANSWER


def all_expressions() -> Iterator[tuple[str, str]]:
    """Every `(prompt, answer)` of the task, such as `("48/2=", "24")`, ordered by operator, then operands."""
    for operator in OPERATORS:
        for left in range(MAX_OPERAND + 1):
            for right in range(MAX_OPERAND + 1):
                answer = evaluate(left, operator, right)
                if answer is not None and within_limits(left, right, answer):
                    yield f"{left}{operator}{right}=", str(answer)


def grade(response_text: str, answer: str) -> float:
    """1.0 if `response_text` is exactly the integer `answer`, else 0.0.

    Strict: an optional `-`, ASCII digits, nothing else: no white space, no leading zeros (`024`), no `-0`, no
    `+`. There is one accepted spelling per integer, so a policy cannot collect rewards for padding. Whether the
    response ended with the end token or at the length limit is not visible here and does not matter.

    Raises ValueError if `answer` itself is not an integer in that spelling: no response could ever match it.
    Example: `grade("24", "24") == 1.0`, `grade("24 ", "24") == 0.0`.
    """
    if not _INTEGER.fullmatch(answer) or answer == "-0" or len(answer) > MAX_RESPONSE_CHARS:
        raise ValueError(
            f"answer: {answer!r} is not an integer of at most {MAX_RESPONSE_CHARS} characters without leading "
            "zeros; correct the row in the data file"
        )
    # Both sides have one spelling per integer, so comparing the texts compares the integers.
    return 1.0 if response_text == answer else 0.0
