"""Wrappings of answers in data sets, layer by layer: a box, a solution that ends with `####`, dollar signs, JSON."""

import ast
import json
import re
import warnings
from typing import Any

from minpro_megatron.rewards.extraction import extract_answer

_DISPLAYS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_TAGGED = re.compile(r"<answer>(.*)</answer>", re.DOTALL)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])")
_LIST_OF_TEXTS = re.compile(r"""\[\s*["']""")
_CONTROL = re.compile(r"[\x00-\x1f]")


def has_box(text: str) -> bool:
    return _BOX.search(text) is not None


def listed(text: str) -> list[Any] | None:
    """The elements of a list of texts written as JSON or Python, or of a single number; None for other texts.

    `[1, 2]` is not such a list: it may be an interval. Raises ValueError for a list that cannot be read.
    """
    if not _LIST_OF_TEXTS.match(text):
        found = _from_json(text) if text.startswith("[") and text.endswith("]") else None
        has_at_most_one = isinstance(found, list) and (
            not found or (len(found) == 1 and type(found[0]) in (int, float))
        )
        return found if has_at_most_one else None
    found = _from_json(text)
    if not isinstance(found, list):
        found = _from_python(text)
    if not isinstance(found, list):
        raise ValueError(f"looks like a list of texts, but is neither JSON nor Python: {text!r:.60}")
    return found


def _from_json(text: str) -> Any:
    """None if the text is not JSON, even with doubled backslashes, which writers of LaTeX forget."""
    for spelling in (text, text.replace("\\", "\\\\")):
        try:
            found = json.loads(spelling)
        except (ValueError, RecursionError):
            continue
        # for "\frac" the first attempt makes a form feed, for "\text" a tab
        if "\\\\" in text or not any(_CONTROL.search(part) for part in _texts(found)):
            return found
    return None


def _texts(found: Any) -> list[str]:
    return [part for part in (found if isinstance(found, list) else [found]) if isinstance(part, str)]


def _from_python(text: str) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # \p is not an escape of Python
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def without_one(text: str) -> str:
    """`text` without its outermost wrapping, or `text` itself. Raises ValueError for an empty wrapping.

    >>> without_one("\\\\boxed{34}"), without_one("$x$."), without_one("3+4=7\\n#### 7"), without_one("$5")
    ('34', 'x', '7', '$5')
    """
    if text.startswith("{") and isinstance(found := _object(text), dict):
        raise ValueError(f"is a JSON object with the fields {', '.join(map(str, found))}; give one of them as a column")
    if "####" in text:
        return _after_hashes(text)
    if (tagged := _TAGGED.fullmatch(text)) is not None:
        return tagged[1].strip()
    inner = extract_answer(text)
    if inner is not None:
        return inner
    if has_box(text):
        raise ValueError("has a box that is empty or not closed; is the answer cut off?")
    if len(text) > 2 and text[0] == text[-1] == '"' and isinstance(found := _from_json(text), str):
        return found.strip()
    return _without_dollars(text)


def _object(text: str) -> Any:
    return _from_json(text) if text.endswith("}") and '"' in text else None


def _after_hashes(text: str) -> str:
    answer = text.rpartition("####")[2].strip()
    if not answer or "\n" in answer:
        raise ValueError("must end with a line '#### <answer>'; is the solution cut off?")
    return answer


def _without_dollars(text: str) -> str:
    """`text` without one pair of formula delimiters around all of it, and a full stop after them."""
    bare = text.removesuffix(".").strip()
    for opening, closing in _DISPLAYS:
        inner = bare[len(opening) : len(bare) - len(closing)]
        is_wrapped = bool(inner) and bare == f"{opening}{inner}{closing}"
        others = inner.replace("\\$", "")  # dollar signs of money
        if is_wrapped and opening not in others and closing not in others and not inner.endswith("\\"):
            return inner.strip()
    return text
