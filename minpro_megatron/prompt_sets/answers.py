"""Answers for the grader: plain text, LaTeX without its dollar signs and boxes, one spelling per number."""

import math
import re
from decimal import Decimal
from typing import Any, Literal

from minpro_megatron.prompt_sets import wrappings
from minpro_megatron.rewards.alternatives import as_one_text
from minpro_megatron.rewards.extraction import last_boxed

# For an answer that is a list: it must have one element, all elements are required, or any one of them is correct.
ListRule = Literal["one", "all", "any"]
MAX_WRAPPINGS = 8  # nested around one answer

_WHOLE = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def answer_text(value: Any, rule: ListRule = "one") -> str:
    """The answer `value` as text. Raises ValueError, with the broken rule, if it is not an answer.

    >>> answer_text(27.0), answer_text(" $\\frac{1}{2}$ "), answer_text('["1", "2"]', "all"), answer_text("\\boxed{3}")
    ('27', '\\frac{1}{2}', '1, 2', '3')
    """
    texts = _texts(value, MAX_WRAPPINGS)
    if len(texts) == 1:
        return texts[0]
    if rule == "all":
        return ", ".join(texts)
    distinct = list(dict.fromkeys(texts))
    if rule == "any":
        return as_one_text(distinct)
    if len(distinct) > 1 and not _are_spellings_of_one(distinct):
        raise ValueError(
            f"holds {len(distinct)} answers ({', '.join(map(repr, distinct))[:60]}); give --answer-list all if "
            "all of them are required, or --answer-list any if any one of them is correct"
        )
    return distinct[0]


def _are_spellings_of_one(texts: list[str]) -> bool:
    from minpro_megatron.rewards.mathematics import equal  # imports sympy

    return all(equal(texts[0], other) for other in texts[1:])


def _texts(value: Any, depth: int) -> list[str]:
    """The answers in `value`; only a list has several."""
    match value:
        case bool() | None:
            raise ValueError(f"must be a text or a number, is {type(value).__name__}")
        case int() | float() | Decimal():
            return [_number(value)]
        case list() if value and depth:
            return [text for part in value for text in _texts(part, depth - 1)]
        case dict():
            raise ValueError(f"must be a text or a number, is an object with {', '.join(map(str, value))}; name one")
        case str() if text := value.strip():
            return _unwrapped(text, depth)
    raise ValueError(f"must be a text or a number and not empty, is {value!r:.60}")


def _number(value: float | Decimal) -> str:
    """A float's shortest decimal; whole numbers without a decimal point or exponent."""
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise ValueError(f"must be a finite number, is {value}")
    exact = value if isinstance(value, Decimal) else Decimal(repr(value))
    if exact == exact.to_integral_value():
        return str(int(exact))  # without -0
    return f"{exact:f}" if isinstance(value, Decimal) else repr(value)


def _unwrapped(text: str, depth: int) -> list[str]:
    for _ in range(depth):
        if (parts := wrappings.listed(text)) is not None:
            return _texts(parts, depth - 1)
        inner = wrappings.without_one(text)
        if inner == text:
            break
        text = inner
    if not text.strip():
        raise ValueError("must be a text or a number and not empty, is nothing in its wrapping")
    return [" ".join(text.split())]


def competition_answer(value: Any, rule: ListRule = "one") -> str:
    """An AIME answer, a whole number from 0 to 999, without leading zeros ("025" is 25)."""
    text = answer_text(value, rule)
    if not _WHOLE.fullmatch(text) or not 0 <= int(text) <= 999:
        raise ValueError(f"must be a whole number from 0 to 999, is {text!r:.60}")
    return str(int(text))


def after_hashes(value: Any, rule: ListRule = "one") -> str:
    """The number after `####` with which a GSM8K solution ends, without thousands separators."""
    solution, mark, text = value.rpartition("\n#### ") if isinstance(value, str) else ("", "", "")
    number = text.strip().replace(",", "")
    if not mark or not solution.strip() or not _NUMBER.fullmatch(number):
        raise ValueError("must end with a line '#### <number>'; is the solution cut off?")
    return number


def boxed(value: Any, rule: ListRule = "one") -> str:
    """The content of the last box of a solution: `\\boxed{2}`, `\\boxed 2` or `\\fbox{2}`. Raises ValueError if there
    is none, or it is not closed."""
    if not isinstance(value, str) or not wrappings.has_box(value):
        raise ValueError("must have its answer in \\boxed{}")
    answer = last_boxed(value)
    if answer is None:
        raise ValueError("has a \\boxed{ that is not closed; is the solution cut off?")
    return answer_text(answer, rule)
