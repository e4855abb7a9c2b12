"""The reward `math`: 1 if the last `Answer:` line or box, whichever is later, has the correct answer; else 0.

Cheap comparisons come first: as text with a unique spelling, as exact numbers, part by part for lists, tuples, sets
and matrices. Symbolic algebra is used only for the rest. grading_golden.jsonl in tests/unit/rewards/ shows what counts
as equal.
"""

import itertools
import re
from fractions import Fraction

from minpro_megatron.rewards import latex_forms as forms
from minpro_megatron.rewards import latex_text, symbolic, units
from minpro_megatron.rewards.alternatives import alternatives
from minpro_megatron.rewards.exact_numbers import MIXED_NUMBER, decimal_places, exact_number, same_number
from minpro_megatron.rewards.extraction import extract_answer
from minpro_megatron.rewards.intervals import read_intervals, same_intervals
from minpro_megatron.rewards.registry import Grade
from minpro_megatron.rewards.sentences import without_words

_SEPARATORS = (",", ";", "\\lor")
# Other commands in a given answer must also be in the correct one: sums, integrals, limits and matrix functions can
# require unlimited work.
_PLAIN_COMMANDS = frozenset({
    "\\frac", "\\sqrt", "\\cdot", "\\pi", "\\infty", "\\sin", "\\cos", "\\tan", "\\cot", "\\sec", "\\csc", "\\arcsin",
    "\\arccos", "\\arctan", "\\sinh", "\\cosh", "\\tanh", "\\ln", "\\log", "\\exp", "\\binom", "\\lfloor", "\\rfloor",
    "\\lceil", "\\rceil", "\\alpha", "\\beta", "\\gamma", "\\delta", "\\epsilon", "\\varepsilon", "\\zeta", "\\eta",
    "\\theta", "\\kappa", "\\lambda", "\\mu", "\\nu", "\\xi", "\\rho", "\\sigma", "\\tau", "\\phi", "\\varphi",
    "\\chi", "\\psi", "\\omega", "\\Gamma", "\\Delta", "\\Theta", "\\Lambda", "\\Xi", "\\Phi", "\\Psi", "\\Omega",
    "\\hbar", "\\ell", "\\le", "\\ge", "\\ne", "\\cup", "\\cap", "\\in", "\\emptyset", "\\prime", "\\dot", "\\ddot",
    "\\bar", "\\overline", "\\hat", "\\vec", "\\angle", "\\odot", "\\max", "\\min",
})  # fmt: skip
_NAME = re.compile(
    r"(?!\\(?:pi|infty)(?![a-zA-Z]))(?:[a-zA-Z]|\\[a-zA-Z]+)(?:_\{[^{}]*\})?(?:\([a-zA-Z\d](?:,[a-zA-Z\d])*\))?"
)
_WORD = re.compile(r"[A-Za-z]{2,}")
_PLAIN_NUMBER = re.compile(r"[+-]?[0-9]{1,400}(?:\.[0-9]{1,400})?")  # most answers: no further analysis needed
_MODULO = ("\\pmod", "\\bmod")
# Longer formulas, and words of more letters than products have, cost the parser seconds and are never equal.
MAX_ALGEBRA_TOKENS = 500
MAX_LETTERS_IN_A_ROW = 7

Tokens = list[str]


def grade(response_text: str, answer: str) -> Grade:
    """1.0 if the response's answer equals `answer`, or one of several (`rewards.alternatives`), else 0.0.

    Raises ValueError if `answer` is empty.
    """
    if not answer.strip():
        raise ValueError("answer: it is empty, nothing can equal it; correct the row in the data file")
    extracted = extract_answer(response_text)
    if extracted is None:
        return Grade(0.0)
    return Grade(1.0 if any(equal(true, extracted) for true in alternatives(answer)) else 0.0, extracted)


def equal(answer: str, given: str) -> bool:
    """True if `given` is a spelling of `answer`. Both as in a response or a data file, with `$` and units."""
    answer, given = latex_text.one_line(answer), latex_text.one_line(given)
    if len(given) > latex_text.MAX_ANSWER_CHARS:
        return False
    if _PLAIN_NUMBER.fullmatch(answer) and _PLAIN_NUMBER.fullmatch(given):
        return Fraction(answer) == Fraction(given)
    left, right = (latex_text.clean(units.with_marked_compounds(without_words(text))) for text in (answer, given))
    try:
        # 1,280 may be a number or a list, 1,080 only a number: both sides are interpreted in the same way
        numbers = latex_text.without_thousands(left), latex_text.without_thousands(right)
        if not latex_text.has_thousands_only(left) and _equal_readings(left, right):
            return True
        return numbers != (left, right) and _equal_readings(*numbers)
    except symbolic.RefusedError:
        return False


def _equal_readings(expected: str, found: str) -> bool:
    if expected == found:
        return bool(expected)
    left, right = units.with_marked_units(expected, found)
    return _equal_parts(forms.tokens_of(left), forms.tokens_of(right))


def _equal_parts(expected: Tokens, found: Tokens) -> bool:
    """Part by part: lists in any order, tuples, sets, intervals and matrices by their brackets."""
    if expected == found:
        return bool(expected)
    if not expected or not found or forms.is_too_deep(found):
        return False
    by_sets = _equal_as_intervals(expected, found)
    if by_sets is not None:
        return by_sets
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


def _equal_as_intervals(expected: Tokens, found: Tokens) -> bool | None:
    """None unless both are sets of real numbers, and at least one is not a single interval."""
    left, right = read_intervals(expected), read_intervals(found)
    if left is None or right is None:
        return None
    if not left.name and not right.name and len(left.parts) == 1 and len(right.parts) == 1:
        return None  # a pair of brackets may be a point
    return same_intervals(left, right, _equal_parts)


def _parts(tokens: Tokens) -> list[Tokens]:
    """The elements of a list or a set; both signs of a +-; the values of `(x,y)=(1,2)` as `x=1, y=2`."""
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
    return (_named_elements(result[0]) or result) if len(result) == 1 else result


def _named_elements(tokens: Tokens) -> list[Tokens] | None:
    """[x=1, y=2] of `(x,y)=(1,2)`."""
    if "=" not in tokens:
        return None
    position = tokens.index("=")
    names, values = forms.unwrapped(tokens[:position]), forms.unwrapped(tokens[position + 1 :])
    if not names or not values or names[:2] != ("(", ")") or values[:2] != ("(", ")"):
        return None
    left, right = forms.split(names[2], (",",)), forms.split(values[2], _SEPARATORS)
    if len(left) != len(right) or len(left) < 2 or not all(_NAME.fullmatch("".join(name)) for name in left):
        return None
    return [[*name, "=", *value] for name, value in zip(left, right, strict=True)]


def _same_elements(left: list[Tokens], right: list[Tokens], expected: Tokens, found: Tokens) -> bool:
    """Compares lists in any order; a tuple also matches its elements without brackets, in the tuple's order."""
    wrapped = forms.unwrapped(expected) if len(left) == 1 else forms.unwrapped(found) if len(right) == 1 else None
    if wrapped and wrapped[0] == "(" and wrapped[1] == ")":
        inside = forms.split(wrapped[2], _SEPARATORS)
        pairs = (inside, _in_order_of_names(right)) if len(left) == 1 else (_in_order_of_names(left), inside)
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


def _in_order_of_names(parts: list[Tokens]) -> list[Tokens]:
    """`y=2, x=1` is the point (1,2); the order of names other than coordinates is not known."""
    names = [_assignment(part)[0] for part in parts]
    if not set(names) <= {"x", "y", "z"}:
        return parts
    return [part for _, part in sorted(zip(names, parts, strict=True), key=lambda pair: pair[0])]


def _equal_brackets(left: tuple[str, str, Tokens], right: tuple[str, str, Tokens]) -> bool:
    """Tuples and intervals: the same brackets around the same elements in the same order."""
    if left[:2] != right[:2]:
        return False
    pairs = forms.split(left[2], _SEPARATORS), forms.split(right[2], _SEPARATORS)
    return len(pairs[0]) == len(pairs[1]) and all(map(_equal_parts, *pairs))


def _equal_atoms(expected: Tokens, found: Tokens) -> bool:
    """Single values: `x = 3` equals `3`, but not `y = 3`."""
    if forms.GAP in expected or forms.GAP in found:
        return False  # 2 5 is equal only to itself
    if "\\approx" in expected or "\\approx" in found:
        return _equal_approximations(expected, found)
    if any(token in _MODULO for token in (*expected, *found)):
        return _equal_residues(expected, found)
    (name, value), (given_name, given) = _assignment(expected), _assignment(found)
    if name and given_name and name != given_name:
        return False
    if name and not given_name and "=" in found and not _has_variables(value):
        return False  # 2x + 1 = 7 is not a spelling of its solution x = 3
    if (name or given_name) and "=" not in (given if name else value):
        return _equal_parts(value, given)
    if "=" in found and "=" not in expected:
        return _is_true_chain(found) and _equal_parts(expected, forms.split(found, ("=",))[-1])
    if units.has_units(expected) or units.has_units(found):
        return units.equal_quantities(expected, found, _equal_parts)
    left, right = forms.joined(expected), forms.joined(found)
    if left == right or (_WORD.fullmatch(left) and left.lower() == right.lower()):
        return True
    return _equal_values(left, right, expected, found)


def _assignment(tokens: Tokens) -> tuple[str, Tokens]:
    """(`f(x)`, the value) of `f(x) = ...`, where a true chain counts with its last value; ("", tokens) otherwise."""
    if "=" in tokens:
        position = tokens.index("=")
        name = "".join(tokens[:position])
        values = forms.split(tokens[position + 1 :], ("=",))
        if _NAME.fullmatch(name) and values and (len(values) == 1 or _is_true_chain(tokens[position + 1 :])):
            return name, values[-1]
    return "", tokens


def _is_true_chain(tokens: Tokens) -> bool:
    """`6/2 = 3`: all sides are equal numbers."""
    sides = forms.split(tokens, ("=",))
    return not _has_variables(tokens) and len(sides) > 1 and all(_equal_parts(sides[-1], side) for side in sides[:-1])


def _has_variables(tokens: Tokens) -> bool:
    return any(token.isalpha() and token not in "ei" for token in tokens)


def _equal_approximations(expected: Tokens, found: Tokens) -> bool:
    """`\\sqrt{10} \\approx 3.162` matches either value, but only if one is the other, rounded."""
    true_sides, sides = forms.split(expected, ("\\approx",)), forms.split(found, ("\\approx",))
    if len(sides) > 1 and _NAME.fullmatch("".join(sides[0])):
        sides = sides[1:]
    exact = forms.split(sides[0], ("=",))[-1]
    if not all(_is_rounded(exact, side) for side in sides[1:]):
        return False
    return any(_equal_parts(true, side) for true in true_sides for side in sides)


def _is_rounded(exact: Tokens, rounded: Tokens) -> bool:
    text = forms.joined(rounded)
    value = exact_number(text)
    if value is None or _has_variables(exact):
        return False
    places = len(text.partition(".")[2])
    number = exact_number(forms.joined(exact))
    if number is not None:
        return abs(number - value) * 10**places <= 1
    return _may_be_read(exact, exact) and symbolic.approximates(forms.joined(exact), value, places, tolerance=1.0)


def _equal_residues(expected: Tokens, found: Tokens) -> bool:
    """`3 \\pmod 7` means 3 if no modulus is asked for, and equals 10 with the same modulus."""
    (value, modulus), (given, given_modulus) = _residue(expected), _residue(found)
    if modulus and given_modulus:
        if not _equal_parts(modulus, given_modulus):
            return False
        numbers = [exact_number(forms.joined(part)) for part in (value, given, modulus)]
        first, second, third = numbers
        if first is not None and second is not None and third:
            return (first - second) % third == 0
    number, size = exact_number(forms.joined(given)), exact_number(forms.joined(given_modulus or modulus))
    is_operator = "\\bmod" in expected or "\\bmod" in found
    if is_operator and (number is None or size is None) and not (modulus and given_modulus):
        return False  # n mod 3 is not n
    if number is not None and size is not None and not 0 <= number < size:
        return False  # 10 mod 7 may also be a spelling of 3
    return _equal_parts(value, given)


def _residue(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """(value, modulus) of `x \\equiv 3 \\pmod{7}`; the modulus is empty if there is none."""
    position = next((index for index, token in enumerate(tokens) if token in _MODULO), len(tokens))
    value, modulus = tokens[:position], forms.without_brackets(tokens[position + 1 :])
    for sign in ("\\equiv", "="):
        if sign in value and _NAME.fullmatch("".join(value[: value.index(sign)])):
            value = value[value.index(sign) + 1 :]
    return value, modulus


def _equal_values(left: str, right: str, expected: Tokens, found: Tokens) -> bool:
    left_percent, right_percent = left.endswith("%"), right.endswith("%")
    number, given = exact_number(left.rstrip("\\%")), exact_number(right.rstrip("\\%"))
    if number is not None and given is not None:
        if same_number(number, given, right.rstrip("\\%")):
            return True
        # 8 % may mean 8 or 0.08
        return left_percent != right_percent and (number == given * 100 if left_percent else number * 100 == given)
    if number is not None and _has_variables(found):
        return False  # 0 squared is not a spelling of 0, whatever the letters mean
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
    """Whether algebra may compare them: the response's commands are plain ones or occur in the correct answer.

    Not for numbers in another base (4210_5), whose index Math-Verify drops, nor for an equation and a value, nor for
    4\\frac{10}{3}, which is neither a mixed number nor clearly a product, nor for sentences.
    """
    commands = {token for token in found if token[0] == "\\" and token[1:].isalpha()}
    has_base = any(
        token.isdecimal() and following == "_"
        for tokens in (expected, found)
        for token, following in itertools.pairwise(tokens)
    )
    is_unclear = any(
        int(match[2][:400]) >= int(match[3][:400])
        for tokens in (expected, found)
        for match in MIXED_NUMBER.finditer(forms.joined(tokens))
    )
    if len(found) > max(MAX_ALGEBRA_TOKENS, 2 * len(expected)):
        return False
    if _letters_in_a_row(found) > max(MAX_LETTERS_IN_A_ROW, _letters_in_a_row(expected)):
        return False
    if _num_primes(expected) != _num_primes(found):
        return False  # the parser drops them
    is_readable = not has_base and not is_unclear and ("=" in expected) == ("=" in found)
    return is_readable and commands <= _PLAIN_COMMANDS | set(expected)


def _num_primes(tokens: Tokens) -> int:
    return tokens.count("'") + tokens.count("\\prime")


def _letters_in_a_row(tokens: Tokens) -> int:
    runs = (list(run) for is_letter, run in itertools.groupby(tokens, str.isalpha) if is_letter)
    return max(map(len, runs), default=0)
