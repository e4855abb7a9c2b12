"""Answers as the grader gets them: plain text, LaTeX without its dollar signs, one spelling for a number."""

import math
import re
from typing import Any

_WHOLE = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def answer_text(value: Any) -> str:
    """The answer `value` as text. Raises ValueError, with the rule, for one that is none.

    >>> answer_text(27.0), answer_text(" $\\frac{1}{2}$ "), answer_text(["1", "2"])
    ('27', '\\frac{1}{2}', '1, 2')
    """
    match value:
        case bool() | None:
            raise ValueError(f"must be a text or a number, is {type(value).__name__}")
        case int():
            return str(value)
        case float():
            if not math.isfinite(value):
                raise ValueError(f"must be a finite number, is {value}")
            return str(int(value)) if value.is_integer() else repr(value)
        case list() if value:  # several right answers, all of them asked for
            return ", ".join(answer_text(part) for part in value)
        case str() if text := " ".join(value.split()):
            return _without_dollars(text)
    raise ValueError(f"must be a text or a number and not empty, is {value!r:.60}")


def _without_dollars(text: str) -> str:
    """`text` without one pair of dollar signs around all of it, and a full stop after them."""
    inner = text.removesuffix(".").strip()
    if len(inner) > 2 and inner[0] == inner[-1] == "$" and "$" not in inner[1:-1]:
        return inner[1:-1].strip()
    return text


def competition_answer(value: Any) -> str:
    """An AIME answer, a whole number from 0 to 999, without leading zeros ("025" is 25)."""
    text = answer_text(value)
    if not _WHOLE.fullmatch(text) or not 0 <= int(text) <= 999:
        raise ValueError(f"must be a whole number from 0 to 999, is {text!r:.60}")
    return str(int(text))


def after_hashes(value: Any) -> str:
    """The number after `####` with which a GSM8K solution ends, without thousands separators."""
    solution, mark, text = value.rpartition("\n#### ") if isinstance(value, str) else ("", "", "")
    number = text.strip().replace(",", "")
    if not mark or not solution.strip() or not _NUMBER.fullmatch(number):
        raise ValueError("must end with a line '#### <number>'; is the solution cut off?")
    return number


def boxed(value: Any) -> str:
    """What the last `\\boxed{...}` of a solution holds. Raises ValueError if there is none, or it is not closed."""
    if not isinstance(value, str) or (start := value.rfind("\\boxed{")) < 0:
        raise ValueError("must have its answer in \\boxed{}")
    depth = 0
    for place in range(start + len("\\boxed"), len(value)):
        if value[place - 1] != "\\":
            depth += {"{": 1, "}": -1}.get(value[place], 0)
        if depth == 0:
            return answer_text(value[start + len("\\boxed{") : place])
    raise ValueError("has a \\boxed{ that is not closed; is the solution cut off?")
