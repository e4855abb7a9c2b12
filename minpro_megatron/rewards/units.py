"""Units of numbers: a response may add them or omit those of the correct answer, but not give different ones."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from minpro_megatron.rewards.exact_numbers import exact_number
from minpro_megatron.rewards.latex_forms import joined

# dimension -> pattern of the name -> its size in the dimension's first unit
_TABLE: dict[str, dict[str, int | str]] = {
    "metre": {
        "m|met(?:er|re)s?": 1, "cm|centimet(?:er|re)s?": "1/100", "mm|millimet(?:er|re)s?": "1/1000",
        "nm|nanomet(?:er|re)s?": "1/1000000000", "km|kilomet(?:er|re)s?": 1000,
    },
    "inch": {"inch(?:es)?": 1, "ft|foot|feet": 12, "yards?|yds?": 36, "miles?|mi": 63360},
    "second": {
        "seconds?|secs?|s": 1, "minutes?|mins?": 60, "hours?|hrs?|h": 3600, "days?": 86400, "weeks?": 604800,
        "milliseconds?|ms": "1/1000",
    },
    "month": {"months?": 1, "years?|yrs?": 12, "decades?": 120, "centur(?:y|ies)": 1200},
    "cent": {"cents?": 1, "dollars?|usd": 100, "nickels?": 5, "dimes?": 10},
    "euro": {"euros?": 1},
    "gram": {"g|grams?": 1, "kg|kilograms?": 1000, "mg|milligrams?": "1/1000"},
    "ounce": {"ounces?|oz": 1, "pounds?|lbs?": 16, "tons?": 32000},
    "litre": {"l|L|lit(?:er|re)s?": 1, "ml|mL|millilit(?:er|re)s?": "1/1000"},
    "cup": {"cups?": 1, "pints?": 2, "quarts?": 4, "gallons?|gal": 16},
    "degree": {r"degrees?|\\degree": 1},
    "radian": {"radians?|rad": 1},
    "celsius": {r"\\degree\s?C|degrees? celsius|C": 1},
    "fahrenheit": {r"\\degree\s?F|degrees? fahrenheit|F": 1},
    "bit": {"bits?": 1, "bytes?": 8},
    "joule": {"joules?|J": 1, "ergs?": "1/10000000"},
    "electronvolt": {"eV|ev": 1, "keV|kev": 1000, "MeV|mev": 10**6},
    "hertz": {"hz|Hz|hertz": 1, "khz|kHz": 1000, "mhz|MHz": 10**6, "ghz|GHz": 10**9},
    "kelvin": {"kelvins?|K": 1}, "mole": {"moles?|mol": 1}, "coulomb": {"coulombs?": 1}, "newton": {"newtons?|N": 1},
    "watt": {"watts?|W": 1}, "volt": {"volts?|V": 1}, "ampere": {"amperes?|amps?|A": 1}, "tesla": {"teslas?|T": 1},
    "person": {"people|persons?": 1}, "child": {"child(?:ren)?": 1},
}  # fmt: skip
# Counted things: each is its own dimension.
_COUNTED = (
    "students?", "points?", "ways", "times", "integers?", "eggs?", "apples?", "books?", "items?", "solutions?",
    "values?", "numbers?", "pairs?", "triples?", "elements?", "sets?", "coins?", "marbles?", "cards?", "boxes",
    "pages?", "cars?", "dogs?", "cats?", "boys?", "girls?", "games?", "tickets?", "cookies?", "toys?", "trees?",
    "flowers?", "bottles?", "bags?", "questions?", "problems?", "triangles?", "squares?", "sides?", "digits?",
    "primes?", "roots?", "terms?", "factors?", "divisors?", "subsets?", "functions?", "steps?", "moves?", "laps?",
    "rows?", "columns?",
)  # fmt: skip
# Units only in the response: \frac{37}{4} m as a correct answer may contain a mass m.
_LETTERS = frozenset("msghlLKJNWVACFT")
_NO_UNIT = r"(?:(?:square|cubic|sq\.?) )?units?(?![a-zA-Z])"  # of any kind

_BASE_UNITS = [
    (pattern, dimension, Fraction(factor)) for dimension, units in _TABLE.items() for pattern, factor in units.items()
] + [(pattern, pattern.rstrip("?"), Fraction(1)) for pattern in _COUNTED]
_NAMES: dict[str, int] = {
    name: index
    for index, (pattern, _, _) in enumerate(_BASE_UNITS)
    for name in re.split(r"\|(?![^(]*\))", pattern)
}  # fmt: skip
_NAME_PATTERNS = {name: re.compile(name, re.IGNORECASE if len(name) > 3 and name[0] != "\\" else 0) for name in _NAMES}
_NAMES_BY_LENGTH = sorted(_NAMES, key=len, reverse=True)
_LINK = r"(?P<link>/ ?|(?<![a-zA-Z])(?:per|an?|each) |\\cdot ?)?"
_PART = (
    rf"{_LINK}(?<![a-zA-Z\\])(?P<power>square |sq\.? |cubic |cu\.? )?(?P<name>NAMES)\.?(?![a-zA-Z(_])"
    r"(?: ?\^ ?\{?(?P<exponent>-?\d)\}?(?!\d))?"
)


def _part_pattern(with_letters: bool) -> re.Pattern[str]:
    names = [name for name in _NAMES_BY_LENGTH if with_letters or name not in _LETTERS]
    marked = [f"(?i:{name})" if len(name) > 3 and name[0] != "\\" else name for name in names]
    return re.compile(_PART.replace("NAMES", "|".join(marked)))


_COMPOUND_NAMES = "|".join(f"(?i:{name})" for name in _NAMES_BY_LENGTH if name not in _LETTERS and name not in _COUNTED)
_COMPOUND = re.compile(rf"(?<=\d )({_COMPOUND_NAMES}),?(?: and)? (?=\d[\d.]* ({_COMPOUND_NAMES})(?![a-zA-Z]))")
_WORD_PART, _LETTER_PART = _part_pattern(False), _part_pattern(True)
_SPEEDS = {"mph": "miles/hour", "kph": "km/hour", "kmh": "km/hour"}
_SPEED = re.compile(r"(?<![a-zA-Z\\])(mph|kph|kmh)(?![a-zA-Z])")
_MONEY = re.compile(r"(?<!\\)\\\$ ?(?=[\d.])")
_BARE_MONEY = re.compile(r"(?<!\\)\$(?=\d)")
_DOLLARS = "\\money"
_MARK = re.compile(r"\\unit[a-z]+|\\money")
_ANY_LETTER = re.compile(r"[A-Za-z]")
_COMMAND_OR_LETTER = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]")
_NUMERIC = frozenset({
    "\\frac", "\\dfrac", "\\tfrac", "\\sqrt", "\\pi", "\\cdot", "\\times", "\\left", "\\right", "\\pm", "\\lor",
    "\\overline", "\\dot", "\\approx", "e", "E",
})  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """The unit of a quantity: its dimensions with exponents, and its size in the first unit of each dimension."""

    dimensions: frozenset[tuple[str, int]]
    factor: Fraction


Quantity = tuple[list[str], Unit | None]


def with_marked_compounds(text: str) -> str:
    """`2 hours and 30 minutes` without its `and`; a dollar sign outside LaTeX becomes a mark before its number."""
    if _ANY_LETTER.search(text):
        text = _COMPOUND.sub(lambda match: f"{match[1]} " if _is_larger(match[1], match[2]) else match[0], text)
    text = _MONEY.sub(r"\\money ", text)
    return _BARE_MONEY.sub(r"\\money ", text) if text.replace("\\$", "").count("$") == 1 else text


def _is_larger(name: str, other: str) -> bool:
    (_, dimension, size), (_, other_dimension, other_size) = (_BASE_UNITS[_index(text)] for text in (name, other))
    return dimension == other_dimension and size > other_size


def _index(text: str) -> int:
    return _NAMES[next(name for name in _NAMES_BY_LENGTH if _NAME_PATTERNS[name].fullmatch(text))]


def with_marked_units(expected: str, found: str) -> tuple[str, str]:
    """Both texts with a mark in place of every unit, if the correct answer is otherwise a number; else unchanged."""
    left = _marked(expected, _WORD_PART)
    if not _is_numeric(left):
        return expected, found
    right = _marked(found, _WORD_PART)
    if not _is_numeric(right):
        right = _marked(found, _LETTER_PART)
    return left, right if _is_numeric(right) else found


def _is_numeric(text: str) -> bool:
    """Numbers, roots, fractions and constants: no remaining letter could be a variable."""
    rest = _MARK.sub(" ", text)
    return any(map(str.isdecimal, rest)) and set(_COMMAND_OR_LETTER.findall(rest)) <= _NUMERIC


def _marked(text: str, part: re.Pattern[str]) -> str:
    if _ANY_LETTER.search(text) is None:
        return text  # most answers are numbers
    text = re.sub(_NO_UNIT, " ", _SPEED.sub(lambda match: _SPEEDS[match[1]], text))
    pieces: list[str] = []
    position = 0
    while match := part.search(text, position):
        pieces.append(text[position : match.start()])
        factors: list[tuple[int, int]] = []
        while match:
            factors.append(_factor(match))
            position = match.end()
            match = part.match(text, position + (text[position : position + 1] == " "))
        pieces.append(f" {_encoded(factors)} ")
    return "".join(pieces) + text[position:]


def _factor(match: re.Match[str]) -> tuple[int, int]:
    """(index of the base unit, exponent)"""
    exponent = int(match["exponent"] or {"s": 2, "c": 3}.get((match["power"] or " ")[0], 1))
    is_below = (match["link"] or "").strip() in ("/", "per", "a", "an", "each")
    return _index(match["name"]), -exponent if is_below else exponent


def _encoded(factors: Sequence[tuple[int, int]]) -> str:
    letters = (chr(97 + index // 26) + chr(97 + index % 26) + chr(97 + 10 + power) for index, power in factors)
    return "\\unit" + "".join(letters)


def _decoded(mark: str) -> Unit:
    if mark == _DOLLARS:
        return _decoded(_encoded([(_NAMES["dollars?"], 1)]))
    letters = mark.removeprefix("\\unit")
    dimensions: Counter[str] = Counter()
    factor = Fraction(1)
    for first, second, power in zip(letters[::3], letters[1::3], letters[2::3], strict=False):
        _, dimension, size = _BASE_UNITS[((ord(first) - 97) * 26 + ord(second) - 97) % len(_BASE_UNITS)]
        exponent = ord(power) - 97 - 10
        dimensions[dimension] += exponent
        factor *= size**exponent
    return Unit(frozenset((name, power) for name, power in dimensions.items() if power), factor)


def has_unit_words_only(text: str) -> bool:
    """True for `m/s`, `dollars per day` and `units`."""
    bare = re.sub(r"\\text|[{}]", " ", text)
    return not _MARK.sub("", _marked(bare, _LETTER_PART)).strip()


def has_units(tokens: Sequence[str]) -> bool:
    return any(token.startswith("\\unit") or token == _DOLLARS for token in tokens)


def _quantities(tokens: Sequence[str]) -> list[Quantity]:
    """Numbers and units in alternation: `5 feet 6 inches`; the last number may have no unit."""
    parts: list[Quantity] = []
    value: list[str] = []
    money = tokens[:1] == [_DOLLARS]
    for token in tokens[1:] if money else tokens:
        if token.startswith("\\unit"):
            parts.append((value, _decoded(token)))
            value = []
        else:
            value.append(token)
    if value or not parts:
        parts.append((value, None))
    if money and parts[0][1] is None:
        parts[0] = parts[0][0], _decoded(_DOLLARS)
    return parts


def _total(parts: Sequence[Quantity]) -> tuple[Fraction, Unit] | None:
    """The sum of parts of decreasing size of the same dimension, in its first unit."""
    numbers = [exact_number(joined(value)) for value, _ in parts]
    units = [unit for _, unit in parts]
    total = Fraction(0)
    for number, unit in zip(numbers, units, strict=True):
        if number is None or unit is None or number < 0 or unit.dimensions != (units[0] or unit).dimensions:
            return None
        total += number * unit.factor
    sizes = [unit.factor for unit in units if unit is not None]
    first = units[0]
    return (total, first) if first and all(larger > smaller for larger, smaller in pairwise(sizes)) else None


def equal_quantities(
    expected: Sequence[str], found: Sequence[str], equal_values: Callable[[list[str], list[str]], bool]
) -> bool:
    """Compares numbers with units, at least one of which has one; a number without a unit may be in any single unit."""
    left, right = _quantities(expected), _quantities(found)
    if len(left) == 1 and len(right) == 1:
        (value, unit), (given, given_unit) = left[0], right[0]
        if not value or not given or "%" in (value[-1], given[-1]):
            return False
        if unit is None or given_unit is None or unit == given_unit:
            return equal_values(value, given)
    totals = _total(left), _total(right)
    if totals[0] is None or totals[1] is None or totals[0][1].dimensions != totals[1][1].dimensions:
        return False
    return totals[0][0] == totals[1][0]
