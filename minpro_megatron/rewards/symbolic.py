"""Decides whether two LaTeX expressions are equal: by value at many points, otherwise with Math-Verify.

Used only in grading processes, whose limits bound the cost of an untrusted expression. Expressions that would certainly
exceed them are rejected first. Nothing is evaluated as Python: `_make_number` replaces sympy's `eval`, which would
convert numerals to numbers.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify.grader import verify
from sympy.parsing import sympy_parser

from minpro_megatron.rewards.evaluation import Program, UndefinedError, UnknownFunctionError, Value
from minpro_megatron.rewards.exact_numbers import MIXED_NUMBER
from minpro_megatron.rewards.sample_points import MAX_SYMBOLS, has_branches, points

Point = Mapping[Any, Fraction]

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of missing time limits: the process has its own

MAX_RESULT_DIGITS = 20_000
PRECISION = 50  # digits; numbers with more digits get enough for neighbouring integers to differ
MAX_PRECISION = 3000
# The last digits that need not agree: far more than rounding errors affect, and few enough that a small term next to a
# large one still counts.
UNCERTAIN_DIGITS = 15
# Smaller values may be rounding errors of a difference that is zero.
CANCELLED = 1e-25
# The minimum number of points at which both formulas are defined and agree.
MIN_AGREEING = 4

_I = sympy.Symbol("i", real=True)  # the parser's name; in answers it is the imaginary unit
# Expressions that the grammar misreads: \gamma as a function or Euler's constant, E_1 as a power of ten, and 2(1/3) as
# the mixed number 2 1/3.
_MISREAD = [
    (re.compile(r"\\gamma(?![a-zA-Z])"), r"\\mathcal{G}"),
    (re.compile(r"(?<![a-zA-Z\\])E(?=_)"), r"\\mathcal{E}"),
    (re.compile(r"(?<=\d)\("), r"\\cdot("),
    # n!^{2} cannot be read, and 2\frac{1}{2}\pi is read as a product
    (re.compile(r"((?<![a-zA-Z\\])[a-zA-Z]|\d+|\([^()]{1,100}\))!\^"), r"(\1!)^"),
    (MIXED_NUMBER, r"(\1+\\frac{\2}{\3})"),
]
# Two factorial signs are one double factorial; a greatest common divisor of symbols is read as 1.
_UNREADABLE = re.compile(r"!!|\\(?:gcd|lcm)(?!\(\d+(?:,\d+)*\))")
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_NUMBER_CODE = re.compile(r"\s*(?:Integer\s*\((\d+)\s*\)|Float\s*\('([\d.eE+-]+)'\s*\))\s*")


def _make_number(code: str, _locals: Any, _globals: Any) -> sympy.Number:
    """Replaces `sympy_parser.eval_expr`, which sympy calls to convert the digits of a numeral to a number."""
    match = _NUMBER_CODE.fullmatch(code) if isinstance(code, str) else None
    if match is None:
        raise ValueError("text that is not a number may not be evaluated")
    return sympy.Integer(int(match[1])) if match[1] else sympy.Float(match[2], PRECISION)


sympy_parser.eval_expr = _make_number


class RefusedError(ValueError):
    """An expression whose value would be too large to compute."""


@lru_cache(maxsize=64)  # the correct answer is compared with every response to its prompt
def parse(latex: str) -> sympy.Basic | sympy.MatrixBase | None:
    """The expression, not evaluated; None if it cannot be read. Raises RefusedError."""
    if _UNREADABLE.search(latex):
        return None
    for pattern, replacement in _MISREAD:
        latex = pattern.sub(replacement, latex)
    try:
        expression = latex2sympy(
            latex, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=_CONVERSION
        )
    except MemoryError:
        raise
    except Exception:  # the grammar's listener raises plain Exception
        return None
    if isinstance(expression, sympy.Expr):
        if _digits(expression) > MAX_RESULT_DIGITS:
            raise RefusedError("its value has too many digits")
        return expression.xreplace({_I: sympy.I})
    return expression if isinstance(expression, sympy.Basic | sympy.MatrixBase) else None


def _digits(expression: sympy.Basic) -> float:
    """An upper bound for the digits of the integers that exact evaluation of the expression could produce."""
    if isinstance(expression, sympy.Float):
        return abs(float(sympy.log(abs(expression), 10))) if expression else 0.0
    if isinstance(expression, sympy.Rational):
        return 0.302 * (expression.p.bit_length() + expression.q.bit_length())
    inside = [_digits(argument) for argument in expression.args if isinstance(argument, sympy.Basic)]
    if isinstance(expression, sympy.Pow) and len(inside) == 2:
        base, exponent = expression.args
        if inside[1] > 6:
            return float("inf")
        # in the worst case a symbolic power is expanded: (x + 1)^1000 has a thousand terms
        return max(inside[0], 1.0) * max(1.0, _bound(exponent, inside[1])) + inside[1] * (not base.is_number)
    if isinstance(expression, sympy.factorial | sympy.binomial) or "amma" in type(expression).__name__:
        largest = max(map(_bound, expression.args, inside), default=0.0)
        return largest * max(1.0, max(inside, default=0.0))
    return sum(inside)


def _bound(expression: Any, digits: float) -> float:
    """An upper bound for the absolute value of an expression whose numbers have at most `digits` digits."""
    if isinstance(expression, sympy.Number):
        return abs(float(expression))
    return 10.0 ** min(digits, 300.0)


@lru_cache(maxsize=256)  # the correct answer is compared with every response to its prompt
def _program(expression: sympy.Expr, digits: int) -> Program | None:
    """None for an expression that cannot be evaluated."""
    try:
        return Program(expression, digits)
    except (UnknownFunctionError, RecursionError):
        return None


def equal(answer: str, given: str) -> bool:
    """True if the expressions are equal wherever `answer` is defined. Raises RefusedError."""
    expected, found = parse(answer), parse(given)
    if expected is None or found is None:
        return False
    if isinstance(expected, sympy.Expr) and isinstance(found, sympy.Expr):
        by_value = _equal_by_value(expected, found)
        if by_value is not None:
            return by_value
    if isinstance(expected, sympy.Eq) and isinstance(found, sympy.Eq):
        proportional = _are_proportional(expected, found)
        if proportional is not None:
            return proportional
    return bool(verify(expected, found, float_rounding=12, numeric_precision=PRECISION, timeout_seconds=None))


def approximates(answer: str, given: Fraction, places: int, tolerance: float = 0.5000001) -> bool:
    """True if the value of `answer` equals `given` up to `tolerance` units of the last of `places` decimal places."""
    expected = parse(answer)
    if not isinstance(expected, sympy.Expr) or expected.free_symbols:
        return False
    program = _program(expected, PRECISION)
    value = None if program is None else _defined(program, {}, is_real=not expected.has(sympy.I))
    if program is None or value is None:
        return False
    difference = abs(program.number(value) - program.number(given))
    return bool(difference * 10**places <= tolerance)


def _defined(program: Program, at: Point, is_real: bool) -> Value | None:
    try:
        return program.value(at, is_real)
    except UndefinedError:
        return None


def _differ(left: Value, right: Value, programs: tuple[Program, Program], digits: int) -> bool:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left != right
    left, right = programs[0].number(left), programs[0].number(right)
    size = max(abs(left), abs(right))
    return bool(abs(left - right) * 10 ** (digits - UNCERTAIN_DIGITS) > size)


class _Comparison:
    """Compares two expressions at points. Raises UnknownFunctionError if one of them cannot be evaluated."""

    def __init__(self, expected: sympy.Expr, found: sympy.Expr, digits: int) -> None:
        self._expressions, self._digits = (expected, found), digits
        self._programs = self._at_precision(digits)
        self.is_slow = any(program.is_slow for program in self._programs)

    def _at_precision(self, digits: int) -> tuple[Program, Program]:
        left, right = (_program(expression, digits) for expression in self._expressions)
        if left is None or right is None:
            raise UnknownFunctionError
        return left, right

    def values(self, at: Point, is_real: bool) -> tuple[Value | None, Value | None]:
        return _defined(self._programs[0], at, is_real), _defined(self._programs[1], at, is_real)

    def are_equal(self, left: Value, right: Value, at: Point, is_real: bool) -> bool:
        """Compares values at one point. A possible rounding error is computed again with more digits."""
        if isinstance(left, Fraction) and isinstance(right, Fraction):
            return left == right
        size = max(abs(self._programs[0].number(value)) for value in (left, right))
        if not _differ(left, right, self._programs, self._digits) and (size > CANCELLED or size == 0):
            return True
        if self.is_slow:
            return not _differ(left, right, self._programs, self._digits)
        digits = 4 * self._digits
        programs = self._at_precision(digits)
        left, right = _defined(programs[0], at, is_real), _defined(programs[1], at, is_real)
        if left is None or right is None:
            return False
        exact_size = max(abs(programs[0].number(value)) for value in (left, right))
        # a difference that keeps shrinking with higher precision is zero
        return exact_size < size * CANCELLED or not _differ(left, right, programs, digits)


def _equal_by_value(expected: sympy.Expr, found: sympy.Expr) -> bool | None:
    """None if the values do not decide it: one of the expressions cannot be evaluated."""
    symbols = sorted(expected.free_symbols | found.free_symbols, key=str)
    if len(symbols) > MAX_SYMBOLS:
        return None
    is_real = not (expected.has(sympy.I) or found.has(sympy.I))
    try:
        if not symbols:
            digits = PRECISION + min(MAX_PRECISION, int(max(_digits(expected), _digits(found))))
            return _equal_constants(_Comparison(expected, found, digits), is_real)
        return _equal_functions(_Comparison(expected, found, PRECISION), expected, found, symbols, is_real)
    except UnknownFunctionError:
        return None


def _equal_constants(comparison: _Comparison, is_real: bool) -> bool | None:
    for real in (True, False) if is_real else (False,):  # \sqrt{-3} is complex, the third root of -8 is -2
        left, right = comparison.values({}, real)
        if left is not None and right is not None:
            return comparison.are_equal(left, right, {}, real)
    return None


def _equal_functions(
    comparison: _Comparison, expected: sympy.Expr, found: sympy.Expr, symbols: Sequence[Any], is_real: bool
) -> bool | None:
    """At all points where both are defined; for piecewise formulas wherever `expected` is defined."""
    rows = list(points((expected, found), symbols))
    if comparison.is_slow:
        rows = rows[:4]
    with_branches = has_branches(expected)
    num_agreeing = 0
    for at in rows:
        left, right = comparison.values(at, is_real)
        if left is None or right is None:
            if with_branches and left is not None and is_real and comparison.values(at, False)[1] is not None:
                return False  # \ln x for \ln|x|
            continue
        if not comparison.are_equal(left, right, at, is_real):
            return False
        num_agreeing += 1
    if num_agreeing >= min(MIN_AGREEING, len(rows)):
        return True
    if not is_real:
        return None
    for at in rows[:4]:  # where both are complex: the only points of \sqrt{-x^2-1}
        left, right = comparison.values(at, False)
        if left is None or right is None:
            return None
        if not comparison.are_equal(left, right, at, False):
            return False
    return True


def _are_proportional(expected: sympy.Eq, found: sympy.Eq) -> bool | None:
    """Whether two equations are equal up to a constant factor; None if the values do not decide it."""
    if not all(isinstance(part, sympy.Expr) for part in (*expected.args, *found.args)):
        return None
    left, right = (_difference(*equation.args) for equation in (expected, found))
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    if not symbols or left.free_symbols != right.free_symbols or len(symbols) > MAX_SYMBOLS:
        return None
    programs = _program(left, PRECISION), _program(right, PRECISION)
    if programs[0] is None or programs[1] is None or programs[0].is_slow or programs[1].is_slow:
        return None
    first: tuple[Any, Any] | None = None
    num_agreeing = 0
    for at in points((left, right), symbols):
        values = [_defined(program, at, is_real=True) for program in programs if program is not None]
        if values[0] is None or values[1] is None:
            continue
        pair = programs[0].number(values[0]), programs[0].number(values[1])
        if first is None:
            first = pair
        if 0 in pair and pair != (0, 0):
            return False
        if _differ(first[0] * pair[1], first[1] * pair[0], (programs[0], programs[1]), PRECISION):
            return False
        num_agreeing += 1
    return True if num_agreeing >= MIN_AGREEING else None


def _difference(left: Any, right: Any) -> sympy.Expr:
    return sympy.Add(left, sympy.Mul(-1, right, evaluate=False), evaluate=False)
