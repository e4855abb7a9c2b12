"""The reward `math`: 1 if the answer on the last `Answer:` line, else in the last box, equals the true one; else 0.

The cheap comparisons come first: as text in one spelling, as exact numbers, part by part for lists, tuples, sets and
matrices; symbolic algebra only for what is left. What counts as equal is shown by `tests/unit/grading_golden.jsonl`.
"""

import itertools
import re
from fractions import Fraction

from minpro_megatron.rewards import latex_forms as forms
from minpro_megatron.rewards import symbolic
from minpro_megatron.rewards.exact_numbers import decimal_places, exact_number, same_number
from minpro_megatron.rewards.extraction import extract_answer
from minpro_megatron.rewards.registry import Grade
from minpro_megatron.rewards.units import without_units

_SEPARATORS = (",", ";")
# Beyond these, what an answer may hold the true one must hold too: sums, integrals, limits and matrix functions can be
# given work without end.
_PLAIN_COMMANDS = frozenset({
    "\\frac", "\\sqrt", "\\cdot", "\\pi", "\\infty", "\\sin", "\\cos", "\\tan", "\\cot", "\\sec", "\\csc", "\\arcsin",
    "\\arccos", "\\arctan", "\\sinh", "\\cosh", "\\tanh", "\\ln", "\\log", "\\exp", "\\binom", "\\lfloor", "\\rfloor",
    "\\lceil", "\\rceil", "\\alpha", "\\beta", "\\gamma", "\\delta", "\\epsilon", "\\varepsilon", "\\zeta", "\\eta",
    "\\theta", "\\kappa", "\\lambda", "\\mu", "\\nu", "\\xi", "\\rho", "\\sigma", "\\tau", "\\phi", "\\varphi",
    "\\chi", "\\psi", "\\omega", "\\Gamma", "\\Delta", "\\Theta", "\\Lambda", "\\Xi", "\\Phi", "\\Psi", "\\Omega",
    "\\hbar", "\\ell", "\\le", "\\ge", "\\ne", "\\cup", "\\cap", "\\in", "\\emptyset", "\\prime", "\\dot", "\\ddot",
    "\\bar", "\\overline", "\\hat", "\\vec", "\\angle", "\\odot",
})  # fmt: skip
_NAME = re.compile(r"(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_\{[^{}]*\})?(?:\([a-zA-Z](?:,[a-zA-Z])*\))?")
_WORD = re.compile(r"[A-Za-z]{2,}")
_OUTSIDE_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MATH_SEGMENT = re.compile(r"(?<!\\)\$+([^$]+?)(?<!\\)\$+")
_CLAUSE = re.compile(r"(?i)^[^$\\\d=(\[{]*?\b(?:is|are|equals?|be)\b:?\s*")

Tokens = list[str]


def grade(response_text: str, answer: str) -> Grade:
    """1.0 if the response's answer equals `answer`, else 0.0. Raises ValueError for an `answer` that is empty."""
    if not answer.strip():
        raise ValueError("answer: it is empty, nothing can equal it; correct the row in the data file")
    extracted = extract_answer(response_text)
    if extracted is None:
        return Grade(0.0)
    return Grade(1.0 if equal(answer, extracted) else 0.0, extracted)


def equal(answer: str, given: str) -> bool:
    """True if `given` is a spelling of `answer`. Both as a response or a data file has them, with `$` and units."""
    if len(given) > forms.MAX_ANSWER_CHARS:
        return False
    left, right = forms.clean(_without_sentence(answer)), forms.clean(_without_sentence(given))
    try:
        # 1,280 may be a number or a list, 1,080 only a number: both sides are read in the same way
        numbers = forms.without_thousands(left), forms.without_thousands(right)
        if not forms.has_thousands_only(left) and _equal_readings(left, right):
            return True
        return numbers != (left, right) and _equal_readings(*numbers)
    except symbolic.RefusedError:
        return False


def _without_sentence(text: str) -> str:
    """The one formula of a line that has words besides, such as `the speed is $3$ m/s`."""
    text = _CLAUSE.sub("", text.strip().strip("*_` "))
    segments = _MATH_SEGMENT.findall(text)
    outside = _MATH_SEGMENT.sub(" ", text)
    return segments[0] if len(segments) == 1 and _OUTSIDE_WORD.search(outside) and segments[0].strip() else text


def _equal_readings(expected: str, found: str) -> bool:
    if expected == found:
        return bool(expected)
    left, right = without_units(expected, found)
    return _equal_parts(forms.braced(forms.tokens_of(left)), forms.braced(forms.tokens_of(right)))


def _equal_parts(expected: Tokens, found: Tokens) -> bool:
    """Part by part: lists in any order, tuples, sets, intervals and matrices by their brackets."""
    if expected == found:
        return bool(expected)
    if not expected or not found or forms.is_too_deep(found):
        return False
    expected, found = forms.without_brackets(expected), forms.without_brackets(found)
    left, right = _parts(expected), _parts(found)
    if len(left) > 1 or len(right) > 1:
        return _same_elements(left, right, expected, found)
    left, right = forms.unwrapped(expected), forms.unwrapped(found)
    if left and right and (len(forms.split(left[2], _SEPARATORS)) > 1 or "\\{" in (left[0], right[0])):
        return _equal_brackets(left, right)
    rows, given_rows = forms.rows_of_matrix(expected), forms.rows_of_matrix(found)
    if rows is not None and given_rows is not None:
        return [len(row) for row in rows] == [len(row) for row in given_rows] and all(
            _equal_parts(a, b)
            for row, given in zip(rows, given_rows, strict=True)
            for a, b in zip(row, given, strict=True)
        )
    return _equal_atoms(expected, found)


def _parts(tokens: Tokens) -> list[Tokens]:
    """The elements of a list, or of a set; both signs of a +-."""
    wrapped = forms.unwrapped(tokens)
    if wrapped and wrapped[:2] == ("\\{", "\\}"):
        tokens = wrapped[2]
    parts = forms.split(tokens, _SEPARATORS)[: forms.MAX_PARTS + 1]
    result: list[Tokens] = []
    for part in parts:
        if "\\pm" in part:
            result += [[sign if token == "\\pm" else token for token in part] for sign in "+-"]
        else:
            result.append(part)
    return result


def _same_elements(left: list[Tokens], right: list[Tokens], expected: Tokens, found: Tokens) -> bool:
    """As lists in any order; a tuple is also matched by its elements without brackets, in its order."""
    wrapped = forms.unwrapped(expected) if len(left) == 1 else forms.unwrapped(found) if len(right) == 1 else None
    if wrapped and wrapped[0] == "(" and wrapped[1] == ")":
        inside = forms.split(wrapped[2], _SEPARATORS)
        pairs = (inside, right) if len(left) == 1 else (left, inside)
        return len(pairs[0]) == len(pairs[1]) and all(map(_equal_parts, *pairs))
    if len(left) != len(right) or len(left) > forms.MAX_PARTS:
        return False
    remaining = list(right)
    for part in left:
        position = next((index for index, other in enumerate(remaining) if _equal_parts(part, other)), None)
        if position is None:
            return False
        del remaining[position]
    return True


def _equal_brackets(left: tuple[str, str, Tokens], right: tuple[str, str, Tokens]) -> bool:
    """Tuples and intervals: the same brackets round the same elements in the same order."""
    if left[:2] != right[:2]:
        return False
    pairs = forms.split(left[2], _SEPARATORS), forms.split(right[2], _SEPARATORS)
    return len(pairs[0]) == len(pairs[1]) and all(map(_equal_parts, *pairs))


def _equal_atoms(expected: Tokens, found: Tokens) -> bool:
    """Single values: `x = 3` equals `3`, but not `y = 3`."""
    (name, value), (given_name, given) = _assignment(expected), _assignment(found)
    if name and given_name and name != given_name:
        return False
    if (name or given_name) and "=" not in (given if name else value):
        return _equal_parts(value, given)
    left, right = forms.joined(expected), forms.joined(found)
    if left == right or (_WORD.fullmatch(left) and left.lower() == right.lower()):
        return True
    return _equal_values(left, right, expected, found)


def _assignment(tokens: Tokens) -> tuple[str, Tokens]:
    """(`f(x)`, the value) of `f(x) = ...`, of which a chain's last value counts; ("", the tokens) of anything else."""
    if "=" in tokens:
        name = "".join(tokens[: tokens.index("=")])
        if _NAME.fullmatch(name):
            return name, tokens[len(tokens) - tokens[::-1].index("=") :]
    return "", tokens


def _equal_values(left: str, right: str, expected: Tokens, found: Tokens) -> bool:
    left_percent, right_percent = left.endswith("%"), right.endswith("%")
    number, given = exact_number(left.rstrip("\\%")), exact_number(right.rstrip("\\%"))
    if number is not None and given is not None:
        if same_number(number, given, right.rstrip("\\%")):
            return True
        # 8 % is 8 to some and 0.08 to others
        return left_percent != right_percent and (number == given * 100 if left_percent else number * 100 == given)
    if _has_huge_numeral(right) or not _may_be_read(expected, found):
        return False
    if number is None and given is not None:
        return _decimal_of(left, given, right) or symbolic.equal(left, right)
    return symbolic.equal(left, right)


def _decimal_of(answer: str, given: Fraction, given_text: str) -> bool:
    places = decimal_places(given_text)
    return places is not None and symbolic.approximates(answer, given, places)


def _has_huge_numeral(text: str) -> bool:
    return re.search(r"\d{100}", text) is not None


def _may_be_read(expected: Tokens, found: Tokens) -> bool:
    """Whether algebra may compare them: the response's commands are plain ones or those of the true answer.

    Not for numbers in another base (4210_5), whose index Math-Verify drops, nor for an equation with a value.
    """
    commands = {token for token in found if token[0] == "\\" and token[1:].isalpha()}
    has_base = any(
        token.isdigit() and following == "_"
        for tokens in (expected, found)
        for token, following in itertools.pairwise(tokens)
    )
    return commands <= _PLAIN_COMMANDS | set(expected) and not has_base and ("=" in expected) == ("=" in found)
