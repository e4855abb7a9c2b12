"""Numbers in answers as exact fractions: most answers are a number, and need no symbolic algebra."""

import re
from fractions import Fraction

MAX_DIGITS = 400  # also of an exponent's result

_UNSIGNED = r"(?:\d+(?:\.\d*)?|\.\d+)"
_DECIMAL = re.compile(rf"([+-]*)({_UNSIGNED})")
_SCIENTIFIC = re.compile(rf"([+-]*)({_UNSIGNED})(?:[eE]|\\cdot10\^)\{{?([+-]?\d+)\}}?")
_POWER_OF_TEN = re.compile(r"([+-]*)()10\^\{([+-]?\d+)\}")
_FRACTION = re.compile(rf"([+-]*)\\frac\{{([+-]?{_UNSIGNED})\}}\{{([+-]?{_UNSIGNED})\}}")
MIXED_NUMBER = re.compile(r"(?<![\d.}])(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_SIGNED_MIXED_NUMBER = re.compile(rf"([+-]*){MIXED_NUMBER.pattern}")
_REPEATING = re.compile(
    r"([+-]*)(\d*)\.(\d*)(?:\\(?:overline|bar)\{(\d+)\}|((?:\\dot\{\d\}\d*)?\\dot\{\d\})|(?<=\.)\((\d+)\))(?:\\[lc]?dots|\.{3})?"
)
_QUOTIENT = re.compile(rf"([+-]*)\(?([+-]?{_UNSIGNED})\)?/\(?({_UNSIGNED})\)?")


def _sign(text: str) -> int:
    return -1 if text.count("-") % 2 else 1


def exact_number(text: str) -> Fraction | None:
    """The number written in `text` (canonical LaTeX); None if it is not a number, or has more than MAX_DIGITS digits.

    Example: `exact_number("\\\\frac{1}{4}") == exact_number("0.25") == Fraction(1, 4)`; `3\\frac{1}{2}` is 3.5, and
    `0.\\overline{3}` is 1/3.
    """
    if len(text) > MAX_DIGITS:
        return None
    if match := _DECIMAL.fullmatch(text):
        return _sign(match[1]) * Fraction(match[2])
    if match := _SCIENTIFIC.fullmatch(text) or _POWER_OF_TEN.fullmatch(text):
        exponent = int(match[3]) if len(match[3]) < 6 else MAX_DIGITS + 1
        if abs(exponent) > MAX_DIGITS:
            return None
        return _sign(match[1]) * Fraction(match[2] or "1") * Fraction(10) ** exponent
    if match := _FRACTION.fullmatch(text):
        numerator, denominator = Fraction(match[2]), Fraction(match[3])
        return None if denominator == 0 else _sign(match[1]) * numerator / denominator
    if match := _SIGNED_MIXED_NUMBER.fullmatch(text):
        numerator, denominator = int(match[3]), int(match[4])
        return _sign(match[1]) * (int(match[2]) + Fraction(numerator, denominator)) if numerator < denominator else None
    if match := _REPEATING.fullmatch(text):
        return _sign(match[1]) * _repeating(match[2], match[3], re.sub(r"\D", "", match[4] or match[5] or match[6]))
    if match := _QUOTIENT.fullmatch(text):
        numerator, denominator = Fraction(match[2]), Fraction(match[3])
        return None if denominator == 0 else _sign(match[1]) * numerator / denominator
    return None


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    """0.12 with the period 3 is 12/100 + 3/900."""
    scale = 10 ** len(fixed)
    repeated = Fraction(int(period), scale * (10 ** len(period) - 1))
    return int(whole or "0") + Fraction(int(fixed or "0"), scale) + repeated


# From this number of digits on, a decimal is accepted for a number without a finite decimal form (1/3, sqrt(2)).
MIN_ROUNDED_DIGITS = 6


def decimal_places(text: str) -> int | None:
    """Places after the point of a decimal of at least MIN_ROUNDED_DIGITS significant digits; None for other texts."""
    match = _DECIMAL.fullmatch(text)
    if not match or "." not in match[2]:
        return None
    significant = match[2].replace(".", "").lstrip("0")
    return len(match[2].partition(".")[2]) if len(significant) >= MIN_ROUNDED_DIGITS else None


def same_number(answer: Fraction, given: Fraction, given_text: str) -> bool:
    """Equal, or `given_text` is the correctly rounded decimal of an `answer` without a finite decimal form."""
    if answer == given:
        return True
    denominator = answer.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    places = decimal_places(given_text)
    return denominator > 1 and places is not None and abs(answer - given) * 10**places <= Fraction(1, 2)
