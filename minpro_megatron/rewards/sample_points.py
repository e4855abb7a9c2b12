"""Points at which two formulas are compared, with the signs, sizes and residues that distinguish formulas."""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import sympy

MAX_SYMBOLS = 12
_INDEX_NAMES = frozenset("ijklmnpqKMN")
# Lengths, masses and other quantities that are never negative: \sqrt{L^2} may be L, \sqrt{x^2} not x.
_POSITIVE_NAME = re.compile(
    r"[A-W](?:_.*)?|(?:lambda|mu|nu|rho|sigma|tau|omega|epsilon|varepsilon|kappa|hbar)(?:_.*)?|[^_xyzuvwabc]_.*"
)
_STEPWISE = (sympy.floor, sympy.ceiling, sympy.Mod)
_OF_INTEGERS = (sympy.factorial, sympy.binomial)
_WITH_BRANCHES = (*_STEPWISE, sympy.Abs, sympy.Max, sympy.Min, sympy.sign)
# A different value for each symbol; the first two points are also used unchanged.
_SMALL = [(3, 2, 5, 4, 7, 6, 8, 9, 11, 10, 13, 12), (5, 7, 3, 8, 2, 9, 4, 6, 13, 11, 10, 12)]
_SIGNS = [(-1, 1, 1), (1, -1, 1), (1, 1, -1), (-1, -1, 1), (-1, 1, -1)]
_NUM_INDEX_POINTS = 36
_LARGE_INDICES = (97, 210, 1001)


def has_branches(*expressions: sympy.Expr) -> bool:
    """Whether the formulas are piecewise: agreement on one piece proves nothing for the others."""
    return any(expression.has(*_WITH_BRANCHES) or bool(_even_roots(expression)) for expression in expressions)


def _even_roots(expression: sympy.Expr) -> list[Any]:
    return [
        power
        for power in expression.atoms(sympy.Pow)
        if isinstance(power.exp, sympy.Rational) and power.base.free_symbols and int(power.exp.q) % 2 == 0
    ]


def index_symbols(*expressions: sympy.Expr) -> set[Any]:
    """The symbols that are positive integers: in factorials, in exponents of -1, n in floor(n / 2)."""
    found: set[Any] = set()
    for expression in expressions:
        for node in expression.atoms(*_OF_INTEGERS):
            found |= node.free_symbols
        for node in expression.atoms(sympy.Pow):
            if node.base.is_number and node.base.is_negative:
                found |= node.exp.free_symbols
        for node in expression.atoms(*_STEPWISE):
            found |= {symbol for symbol in node.free_symbols if str(symbol) in _INDEX_NAMES}
    return found


def points(expressions: Sequence[sympy.Expr], symbols: Sequence[Any]) -> Iterator[dict[Any, Fraction]]:
    """Values for `symbols` (at most MAX_SYMBOLS); the first four are small and positive."""
    integers = index_symbols(*expressions)
    rows = list(_real_rows(_scale(expressions), has_branches(*expressions)))
    count = max(len(rows), _NUM_INDEX_POINTS) if integers else len(rows)
    for number in range(count):
        row = rows[number % len(rows)]
        yield {
            symbol: Fraction(_index(number, column)) if symbol in integers else _signed(symbol, row[column])
            for column, symbol in enumerate(symbols)
        }
    if integers and not any(expression.has(*_OF_INTEGERS) for expression in expressions):
        for number in _LARGE_INDICES:
            yield {
                symbol: Fraction(number + 13 * column) if symbol in integers else rows[0][column]
                for column, symbol in enumerate(symbols)
            }


def _index(number: int, column: int) -> int:
    """1, 2, 3, ... for the first symbol; for others all of 1 to 23, in other orders."""
    return number + 1 if column == 0 else (number * (5 + 2 * column) + 3 * column) % 23 + 1


def _signed(symbol: Any, value: Fraction) -> Fraction:
    return abs(value) if _POSITIVE_NAME.fullmatch(str(symbol).replace("\\", "")) else value


def _scale(expressions: Sequence[sympy.Expr]) -> Fraction:
    """The largest constant, beyond which |x - 100| has its other branch."""
    numbers = [abs(node) for expression in expressions for node in expression.atoms(sympy.Number)]
    sizes = [Fraction(str(number)) for number in numbers if number.is_finite and number < 10**6]
    return max(sizes, default=Fraction(1))


def _real_rows(scale: Fraction, with_branches: bool) -> Iterator[list[Fraction]]:
    between = [[Fraction(10 * value + 3, 31) for value in row] for row in _SMALL]
    whole = [[Fraction(value) for value in row] for row in _SMALL]
    large = [scale * 2 + Fraction(37 * value, 7) for value in _SMALL[0]]
    below_one = [Fraction(2 * value + 1, 29) for value in _SMALL[1]]
    yield from (between[0], whole[0], between[1], whole[1])
    yield below_one
    yield large
    for row in (between[0], large, below_one):
        yield [-value for value in row]
    for signs in _SIGNS:
        yield [value * signs[column % 3] for column, value in enumerate(between[1])]
    if not with_branches:
        return
    for number, signs in enumerate(_SIGNS):
        yield [
            value * signs[column % 3] * (number + 2) / 3 for column, value in enumerate(large[number:] + large[:number])
        ]
    for number in range(12):  # on both sides of every constant
        part = Fraction(2 * number - 11, 9) * scale
        row = _SMALL[number % 2]
        yield [part + Fraction(value * (-1) ** (number + column), 17) for column, value in enumerate(row)]
