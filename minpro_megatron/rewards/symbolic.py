"""Are two LaTeX expressions equal? By value at several points, else by Math-Verify.

Used in grading processes only: what an expression from outside may cost is bounded by their limits. Expressions that
would certainly exceed them are refused first. Nothing is evaluated as Python: where sympy would use `eval` to make a
number of a numeral, `_make_number` does it.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify.grader import verify
from sympy.parsing import sympy_parser

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of missing time limits: the process has one

MAX_RESULT_DIGITS = 20_000
PRECISION = 50  # digits; for numbers that have more, so many that neighbouring integers differ
MAX_PRECISION = 3000
# Of these digits as many need not agree: far more than rounding errors reach, few enough for small terms beside large.
UNCERTAIN_DIGITS = 15
# Integers for what is defined on them only, and points between them; small ones, so that no term hides another.
# Different symbols get different ones.
_INTEGER_POINTS = [(3, 2, 5, 4, 7, 6, 8, 9), (5, 7, 3, 8, 2, 9, 4, 6)]
_POINTS = [tuple(Fraction(10 * value + 3, 31) for value in point) for point in _INTEGER_POINTS]
# Only here does an absolute value differ from what it is of.
_NEGATIVE_POINTS = [tuple(-value for value in point) for point in _POINTS]
_ON_INTEGERS = (sympy.floor, sympy.ceiling, sympy.factorial, sympy.binomial, sympy.Mod)

_I = sympy.Symbol("i", real=True)  # as the parser names it; in answers it is the imaginary unit
# What the grammar takes for something else: \gamma for a function or Euler's constant, E_1 for a power of ten, and
# 2(1/3) for the mixed number 2 1/3.
_MISREAD = [
    (re.compile(r"\\gamma(?![a-zA-Z])"), r"\\mathcal{G}"),
    (re.compile(r"(?<![a-zA-Z\\])E(?=_)"), r"\\mathcal{E}"),
    (re.compile(r"(?<=\d)\("), r"\\cdot("),
]
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_NUMBER_CODE = re.compile(r"\s*(?:Integer\s*\((\d+)\s*\)|Float\s*\('([\d.eE+-]+)'\s*\))\s*")


def _make_number(code: str, _locals: Any, _globals: Any) -> sympy.Number:
    """In the place of `sympy_parser.eval_expr`, which sympy calls to make a number of the digits of a numeral."""
    match = _NUMBER_CODE.fullmatch(code) if isinstance(code, str) else None
    if match is None:
        raise ValueError("text that is no number may not be evaluated")
    return sympy.Integer(int(match[1])) if match[1] else sympy.Float(match[2], PRECISION)


sympy_parser.eval_expr = _make_number


class RefusedError(ValueError):
    """An expression whose value would be too large to compute."""


@lru_cache(maxsize=64)  # the true answer comes with every response to its prompt
def parse(latex: str) -> sympy.Basic | sympy.MatrixBase | None:
    """The expression, not evaluated; None if it cannot be read. Raises RefusedError."""
    for pattern, replacement in _MISREAD:
        latex = pattern.sub(replacement, latex)
    try:
        expression = latex2sympy(
            latex, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=_CONVERSION
        )
    except MemoryError:
        raise
    except Exception:  # the grammar's listener raises Exception itself
        return None
    if isinstance(expression, sympy.Expr):
        if _digits(expression) > MAX_RESULT_DIGITS:
            raise RefusedError("its value has too many digits")
        return expression.xreplace({_I: sympy.I})
    return expression if isinstance(expression, sympy.Basic | sympy.MatrixBase) else None


def _digits(expression: sympy.Basic) -> float:
    """An upper bound for the digits of the integers that evaluating the expression exactly could make."""
    if isinstance(expression, sympy.Float):
        return abs(float(sympy.log(abs(expression), 10))) if expression else 0.0
    if isinstance(expression, sympy.Rational):
        return 0.302 * (expression.p.bit_length() + expression.q.bit_length())
    inside = [_digits(argument) for argument in expression.args if isinstance(argument, sympy.Basic)]
    if isinstance(expression, sympy.Pow) and len(inside) == 2:
        base, exponent = expression.args
        if inside[1] > 6:
            return float("inf")
        # a symbolic power is expanded at worst: (x + 1)^1000 has a thousand terms
        return max(inside[0], 1.0) * max(1.0, _bound(exponent, inside[1])) + inside[1] * (not base.is_number)
    if isinstance(expression, sympy.factorial | sympy.binomial) or "amma" in type(expression).__name__:
        largest = max(map(_bound, expression.args, inside), default=0.0)
        return largest * max(1.0, max(inside, default=0.0))
    return sum(inside)


def _bound(expression: Any, digits: float) -> float:
    """An upper bound for the absolute value of an expression whose numbers have at most so many digits."""
    if isinstance(expression, sympy.Number):
        return abs(float(expression))
    return 10.0 ** min(digits, 300.0)


def equal(answer: str, given: str) -> bool:
    """True if the expressions are equal wherever both are defined. Raises RefusedError."""
    expected, found = parse(answer), parse(given)
    if expected is None or found is None:
        return False
    if isinstance(expected, sympy.Expr) and isinstance(found, sympy.Expr):
        by_value = _equal_by_value(expected, found)
        if by_value is not None:
            return by_value
    return bool(verify(expected, found, float_rounding=12, numeric_precision=PRECISION, timeout_seconds=None))


def approximates(answer: str, given: Fraction, places: int) -> bool:
    """True if the value of the expression `answer`, rounded to `places` after the point, is `given`."""
    expected = parse(answer)
    if not isinstance(expected, sympy.Expr) or expected.free_symbols:
        return False
    value = _value(expected, {}, PRECISION)
    if value is None or not value.is_real:
        return False
    difference = abs(value - sympy.Rational(given.numerator, given.denominator))
    return bool(difference * 10**places <= sympy.Float("0.5000001", PRECISION))


def _equal_by_value(expected: sympy.Expr, found: sympy.Expr) -> bool | None:
    """None if the values do not say: one of the expressions cannot be evaluated."""
    symbols = sorted(expected.free_symbols | found.free_symbols, key=str)
    if len(symbols) > len(_POINTS[0]):
        return None
    precision = PRECISION
    if not symbols:
        precision += min(MAX_PRECISION, int(max(_digits(expected), _digits(found))))
    on_integers = expected.has(*_ON_INTEGERS) or found.has(*_ON_INTEGERS)
    points = _INTEGER_POINTS if on_integers else _POINTS + _INTEGER_POINTS
    if expected.has(sympy.Abs) or found.has(sympy.Abs):
        points = points + _NEGATIVE_POINTS
    for point in points if symbols else points[:1]:
        values = (sympy.Rational(value.numerator, value.denominator) for value in point)
        at = dict(zip(symbols, values, strict=False))
        left, right = _value(expected, at, precision), _value(found, at, precision)
        if point in _NEGATIVE_POINTS and not (_is_real(left) and _is_real(right)):
            continue  # outside of the domain of one of them: \ln x
        if left is None or right is None:
            return None
        if abs(left - right) * 10 ** (precision - UNCERTAIN_DIGITS) > max(abs(left), abs(right)):
            return False
    return True


def _is_real(value: sympy.Expr | None) -> bool:
    return value is not None and bool(value.is_real)


def _value(expression: sympy.Expr, at: dict[Any, Any], precision: int) -> sympy.Expr | None:
    try:
        value = expression.evalf(precision, subs=at)
    except (ValueError, TypeError, ArithmeticError, AttributeError, NotImplementedError):
        return None
    if not isinstance(value, sympy.Expr):
        return None
    parts = value.as_real_imag()
    return value if all(isinstance(part, sympy.Number) and part.is_finite for part in parts) else None
