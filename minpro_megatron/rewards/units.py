"""Units behind a number: a response may add them, or leave those of the true answer out."""

import re

_WORDS = [
    "degrees?", "radians?", "units?", "dollars?", "cents?", "miles?", "mph", "mi", "hours?", "hrs?", "minutes?",
    "mins?", "min", "seconds?", "secs?", "days?", "weeks?", "months?", "years?", "yrs?", "meters?", "metres?",
    "centimeters?", "kilometers?", "kilograms?", "grams?", "inches", "inch", "feet", "foot", "ft", "yards?",
    "pounds?", "lbs?", "km/h", "m/s", "cm", "km", "mm", "nm", "kg", "mg", "ml", "liters?", "litres?", "square",
    "cubic", "per", "sq", "people", "students?", "joules?", "ergs?", "kelvin", "hz", "khz", "mhz", "ghz", "ev",
    "kev", "mev", "moles?", "mol", "bits?", "bytes?", "coulombs?", "newtons?", "watts?", "volts?", "amperes?",
    "points?", "ways", "times", "integers?", "eggs?", "apples?", "books?", "items?",
]  # fmt: skip
_LETTERS = "msghKJNWVALCFTBM"
_UNIT_WORD = re.compile(
    rf"(?<![a-zA-Z\\])(?:{'|'.join(sorted(_WORDS, key=len, reverse=True))})(?![a-zA-Z])(?:\s*\^\s*\{{?-?\d\}}?)?", re.I
)
_UNIT_LETTER = re.compile(rf"(?<=[\d}}\s])[{_LETTERS}](?![a-zA-Z(_])(?:\s*\^\s*\{{?-?\d\}}?)?")
_COMMAND_OR_LETTER = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]")
_CONSTANTS = {
    "\\frac",
    "\\sqrt",
    "\\pi",
    "\\cdot",
    "\\times",
    "\\left",
    "\\right",
    "\\dfrac",
    "\\tfrac",
    "e",
    "E",
    "\\pm",
}


def _is_numeric(text: str) -> bool:
    """A number, or one of roots, fractions and constants: no letter is left that could be a variable."""
    return any(map(str.isdigit, text)) and set(_COMMAND_OR_LETTER.findall(text)) <= _CONSTANTS


def without_units(expected: str, found: str) -> tuple[str, str]:
    """Both texts without units, if what is left of the true answer is a number; else both as they are.

    Single letters are units in the response only: `\\frac{37}{4} m` as a true answer may hold a mass.
    """
    left = _stripped(_UNIT_WORD.sub(" ", expected))
    if not _is_numeric(left):
        return expected, found
    right = _UNIT_WORD.sub(" ", found)
    if not _is_numeric(right):
        right = _UNIT_LETTER.sub(" ", right)
    right = _stripped(right)
    return left, right if _is_numeric(right) else found


def _stripped(text: str) -> str:
    """Without what units leave behind: `m/s` its stroke, `5 \\cdot m` its dot."""
    return re.sub(r"(?:\s|/|\\cdot|\\,|\\ |~)+$", "", text.strip().lstrip("$").rstrip("$")).strip()
