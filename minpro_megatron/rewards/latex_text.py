"""An answer as text with a unique spelling: wrappers, emphasis and other characters become LaTeX.

Text in, text out; nothing is evaluated. `latex_forms` continues with its tokens.
"""

import re
from decimal import Decimal

# Longer texts are not answers; the longest answer of the benchmarks has 300 characters.
MAX_ANSWER_CHARS = 1000

_CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "π": "\\pi ", "∞": "\\infty ", "∪": "\\cup ",
    "∩": "\\cap ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "°": "\\degree ", "±": "\\pm ", "√": "\\sqrt ",
    "θ": "\\theta ", "½": " \\frac{1}{2}", "⅓": " \\frac{1}{3}", "⅔": " \\frac{2}{3}", "¼": " \\frac{1}{4}",
    "¾": " \\frac{3}{4}", "²": "^{2}", "³": "^{3}", "≈": "\\approx ", "≡": "\\equiv ", "∈": "\\in ", "∨": "\\lor ",
    "⌊": "\\lfloor ", "⌋": "\\rfloor ", "⌈": "\\lceil ", "⌉": "\\rceil ", "∅": "\\emptyset ", "€": " euros ",
    "‘": "'", "’": "'",
})  # fmt: skip
_TEXT_COMMANDS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|mathtt|mbox|hbox|boldsymbol"
    r"|bm|emph|operatorname|rm)\s?\{([^{}]*)\}"
)
# Plain names that are often written in place of commands.
_BARE_NAME = re.compile(
    r"(?<![\\a-zA-Z])(?:np\.|math\.|sp\.)?(sqrt|pi|infty|arcsin|arccos|arctan|sin|cos|tan|ln|log|exp|floor|ceil)(?![a-zA-Z])"
)
_ROOT_CALL = re.compile(r"\\sqrt\s?\(([^()]*)\)")
_ROUNDING_CALL = re.compile(r"\\(floor|ceil)\s?\(([^()]*)\)")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")  # of a formula; these are not mathematical brackets
_DEGREES = re.compile(r"\^\s?(?:\{\s?\\(?:circ|degree)\s?\}|\\(?:circ|degree)(?![a-zA-Z]))|\\degrees?(?![a-zA-Z])")
_LETTER = re.compile(r"[a-zA-Z]")
_BARE_POINT = re.compile(r"(?<=\d)\.(?![\d.(\\])")  # 1./3, but not 0.(3) and 0.\overline{3}
_PERCENT = re.compile(r"\\?%|\b(?:percent(?:age)?|pct)\b")
_ENUMERATION = re.compile(r" ?(?:\\text\{)? ?,? ?\b(and|or)\b ?\}? ?")
_ROW_SPACING = re.compile(r"\\\\ ?\[-?[\d.]{1,6} ?(?:pt|em|ex|mm|cm|in)\]")
_EMPTY_DELIMITER = re.compile(r"\\(?:left|right) ?\.")
_ENVIRONMENT = re.compile(r"\\(?:begin|end) ?\{(?:aligned|align|equation|gathered|gather|split|displaymath)\*?\}")
_SPECIAL_TOKEN = re.compile(r"<\|[a-zA-Z_ ]{1,30}\|>|</s>|</?answer>")
_MODULO = re.compile(r"\( ?(?:\\?(?:mod|bmod|text\{ ?mod ?\})) ?([a-zA-Z0-9]{1,20}) ?\)")
_BARE_MODULO = re.compile(r"(?<=[\d)\s])mod(?:ulo)? (?=[\da-zA-Z])")
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALED = re.compile(
    rf"(?<![\d.,/^_{{}}a-zA-Z])(\d{{1,15}}(?:,\d{{3}}){{0,5}}(?:\.\d{{1,15}})?) ?({'|'.join(_SCALES)})(?![a-zA-Z])"
)


def one_line(text: str) -> str:
    """The text with single spaces, and without text commands and tokens that end a model's turn.

    It runs before any limit is checked, and prevents the later patterns from seeing long white space.
    """
    text = " ".join(_SPECIAL_TOKEN.sub(" ", text).split())
    if "\\" not in text:
        return text
    for _ in range(3):  # they may be nested
        text = _TEXT_COMMANDS.sub(r" \1 ", text)
    return " ".join(text.split())


def clean(text: str) -> str:
    """The answer, as returned by `one_line`, without emphasis and characters that LaTeX has commands for."""
    text = text.translate(_CHARACTERS).replace("**", "^").replace("{,}", ",")
    if "\\" in text:
        text = _ROW_SPACING.sub(r"\\\\ ", _EMPTY_DELIMITER.sub(" ", text))
        text = _ENVIRONMENT.sub(" ", _DELIMITER.sub(" $ ", text))
        text = text.replace(",\\! ", ",").replace(",\\!", ",").replace("\\!,", ",")
        text = _DEGREES.sub(r"\\degree ", text)
    text = text.replace(">=", "\\ge ").replace("<=", "\\le ").replace(" != ", "\\ne ")
    text = _BARE_POINT.sub("", text)
    if _LETTER.search(text):
        text = _MODULO.sub(r" \\pmod{\1}", text)
        text = _BARE_MODULO.sub(r"\\bmod ", " ".join(text.split()))
        text = _SCALED.sub(_scaled, text)
        text = _ENUMERATION.sub(lambda match: "," if match[1] == "and" else " \\lor ", text)
        text = _BARE_NAME.sub(r"\\\1 ", text)
        text = _ROUNDING_CALL.sub(lambda match: f"\\l{match[1]} {match[2]}\\r{match[1]} ", text)
        text = _ROOT_CALL.sub(r"\\sqrt{\1}", text)
    return " ".join(_PERCENT.sub("%", text).split()).rstrip(".,;: ")


def _scaled(match: re.Match[str]) -> str:
    """`12 million` as a number."""
    return f"{Decimal(match[1].replace(',', '')) * _SCALES[match[2]]:f} "


def without_thousands(text: str) -> str:
    """`1,080` as `1080`; not inside brackets, where commas separate elements."""
    if any(bracket in text for bracket in "([{"):
        return text
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def has_thousands_only(text: str) -> bool:
    """True for `1,080` and `2,000`: no element of a list would begin with a zero."""
    return without_thousands(text) != text and re.search(r",0\d\d", text) is not None
