"""Sets of real numbers as intervals, whether written as such or as inequalities: `x < 3` is `(-\\infty, 3)`."""

import re
from collections.abc import Callable
from typing import NamedTuple

from minpro_megatron.rewards.latex_forms import split, unwrapped

Tokens = list[str]
_NAME = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_\{[^{}]*\})?")
_LESS = {"<": ")", "\\le": "]"}
_GREATER = {">": "(", "\\ge": "["}
_RELATIONS = (*_LESS, *_GREATER)
_INFINITY = ["\\infty"]
_MINUS_INFINITY = ["-", "\\infty"]
_NOT_NAMES = ("\\infty", "\\pi")


class Interval(NamedTuple):
    left: str
    low: Tokens
    high: Tokens
    right: str


class Intervals(NamedTuple):
    """A union of intervals; `name` is the variable of the inequalities, "" if they are written as intervals."""

    name: str
    parts: list[Interval]


def read_intervals(tokens: Tokens) -> Intervals | None:
    """None if the tokens are neither inequalities of one variable nor intervals."""
    tokens = _without_set_builder(tokens)
    name = ""
    if len(tokens) > 2 and "\\in" in tokens[1:] and _is_name(tokens[: tokens.index("\\in")]):
        name = "".join(tokens[: tokens.index("\\in")])
        tokens = tokens[tokens.index("\\in") + 1 :]
    alternatives = split(tokens, ("\\lor",))
    relations = [_relation(part) for part in alternatives]
    if relations and all(relation is not None for relation in relations):
        names = {relation[0] for relation in relations if relation is not None}
        if len(names) == 1:
            parts = [part for relation in relations if relation is not None for part in relation[1]]
            return Intervals(names.pop(), parts)
    parts = [_interval(part) for part in split(tokens, ("\\cup",))]
    if parts and all(part is not None for part in parts):
        return Intervals(name, [part for part in parts if part is not None])
    return None


def same_intervals(left: Intervals, right: Intervals, equal: Callable[[Tokens, Tokens], bool]) -> bool:
    """Whether they have the same variable, if both name one, and the same parts in any order."""
    if (left.name and right.name and left.name != right.name) or len(left.parts) != len(right.parts):
        return False
    remaining = list(right.parts)
    for part in left.parts:
        found = next((other for other in remaining if _same_interval(part, other, equal)), None)
        if found is None:
            return False
        remaining.remove(found)
    return True


def _same_interval(left: Interval, right: Interval, equal: Callable[[Tokens, Tokens], bool]) -> bool:
    same_brackets = (left.left, left.right) == (right.left, right.right)
    return same_brackets and equal(left.low, right.low) and equal(left.high, right.high)


def _is_name(tokens: Tokens) -> bool:
    text = "".join(tokens)
    return _NAME.fullmatch(text) is not None and text not in _NOT_NAMES


def _interval(tokens: Tokens) -> Interval | None:
    wrapped = unwrapped(tokens)
    if not wrapped or wrapped[0] not in "([" or wrapped[1] not in ")]":
        return None
    ends = split(wrapped[2], (",", ";"))
    if len(ends) != 2:
        return None
    return Interval(wrapped[0], ends[0], _INFINITY if ends[1] == ["+", "\\infty"] else ends[1], wrapped[1])


def _relation(tokens: Tokens) -> tuple[str, list[Interval]] | None:
    """(variable, intervals) of `x < 3`, `3 > x`, `0 \\le x < 1` and `x \\ne 5`."""
    signs = [token for token in tokens if token in (*_RELATIONS, "\\ne")]
    parts = split(tokens, (*_RELATIONS, "\\ne"))
    if len(parts) != len(signs) + 1 or not 1 <= len(signs) <= 2:
        return None
    if len(signs) == 2:
        rising = all(sign in _LESS for sign in signs)
        if not rising and not all(sign in _GREATER for sign in signs):
            return None
        if not rising:
            parts.reverse()
            signs = [_reversed(sign) for sign in reversed(signs)]
        if not _is_name(parts[1]):
            return None
        left = "(" if signs[0] == "<" else "["
        return "".join(parts[1]), [Interval(left, parts[0], parts[2], _LESS[signs[1]])]
    (name, value), sign = parts, signs[0]
    if _is_name(value) and not _is_name(name):
        name, value, sign = value, name, _reversed(sign)
    if not _is_name(name) or _is_name(value):
        return None
    below, above = Interval("(", _MINUS_INFINITY, value, ")"), Interval("(", value, _INFINITY, ")")
    if sign == "\\ne":
        return "".join(name), [below, above]
    if sign in _LESS:
        return "".join(name), [below._replace(right=_LESS[sign])]
    return "".join(name), [above._replace(left=_GREATER[sign])]


def _reversed(sign: str) -> str:
    return {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}.get(sign, sign)


def _without_set_builder(tokens: Tokens) -> Tokens:
    """`x < 3` of `\\{x : x < 3\\}` and `\\{x \\in \\mathbb{R} \\mid x < 3\\}`."""
    wrapped = unwrapped(tokens)
    if not wrapped or wrapped[0] != "\\{":
        return tokens
    content = wrapped[2]
    bar = next((position for position, token in enumerate(content) if token in (":", "|", "\\mid")), None)
    if bar is None or not _is_name(content[:1]) or content[1:bar] not in ([], ["\\in", "\\mathbb", "{", "R", "}"]):
        return tokens
    return content[bar + 1 :]
