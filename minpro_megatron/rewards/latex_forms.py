"""One spelling for the many of a mathematical answer, and its parts: lists, tuples, sets, intervals, matrices.

Text in, text out; nothing is evaluated. The result is LaTeX again, so that a symbolic parser can read it.
"""

import re

# Longer answers are no answers; the longest of the benchmarks has 300 characters.
MAX_ANSWER_CHARS = 1000
MAX_DEPTH = 12
MAX_BARS = 16
MAX_PARTS = 64

_CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "/", "π": "\\pi ", "∞": "\\infty ", "∪": "\\cup ",
    "∩": "\\cap ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "°": "^{\\circ}", "±": "\\pm ", "√": "\\sqrt ",
    "θ": "\\theta ", "½": "\\frac{1}{2}", "\u00a0": " ", "\u202f": " ", "²": "^{2}", "³": "^{3}",
})  # fmt: skip
_TOKEN = re.compile(r"\\[a-zA-Z]+\*?|\\.|\S")
_SAME_COMMAND = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\dbinom": "\\binom", "\\tbinom": "\\binom",
    "\\geqslant": "\\ge", "\\geq": "\\ge", "\\leqslant": "\\le", "\\leq": "\\le", "\\neq": "\\ne", "\\times": "\\cdot",
    "\\ast": "\\cdot", "*": "\\cdot", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]",
    "\\lparen": "(", "\\rparen": ")", "\\div": "/", "\\lt": "<", "\\gt": ">", "\\vert": "|", "\\lvert": "|",
    "\\rvert": "|", "\\varnothing": "\\emptyset", "\\operatorname*": "\\operatorname",
}  # fmt: skip
# Spacing, sizes and emphasis mean nothing.
_IGNORED = {
    "$", "\\$", "\\!", "\\,", "\\;", "\\:", "\\>", "\\ ", "~", "\\(", "\\)", "\\[", "\\]", "\\left", "\\right",
    "\\quad", "\\qquad", "\\displaystyle", "\\textstyle", "\\big", "\\Big", "\\bigl", "\\bigr", "\\Bigl", "\\Bigr",
    "\\bigg", "\\Bigg", "\\limits", "\\nolimits", "\\rm", "\\bf", "\\it", "`",
}  # fmt: skip
_TEXT_COMMANDS = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|boldsymbol|operatorname|rm)"
    r"\s*\{([^{}]*)\}"
)
# Names that programmers and hurried writers use for commands.
_BARE_NAME = re.compile(
    r"(?<![\\a-zA-Z])(?:np\.|math\.|sp\.)?(sqrt|pi|infty|arcsin|arccos|arctan|sin|cos|tan|ln|log|exp)(?![a-zA-Z])"
)
_ROOT_CALL = re.compile(r"\\sqrt\s*\(([^()]*)\)")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]")  # of a formula; the brackets in them are none
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ|\\degree)|\\degree")
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_BARE_POINT = re.compile(r"(?<=\d)\.(?![\d.])")  # 1./3
_PERCENT = re.compile(r"\\?%|\bpercent(?:age)?\b")
_ENUMERATION = re.compile(r"\s*(?:\\text\{)?\s*,?\s*\b(?:and|or)\b\s*\}?\s*")


def clean(text: str) -> str:
    """The answer without emphasis, text commands, degree signs and characters that LaTeX has commands for."""
    text = _DELIMITER.sub(" ", text.translate(_CHARACTERS)).replace("**", "^")
    text = text.replace("{,}", ",").replace(",\\!", ",").replace("\\!,", ",")
    text = _DEGREES.sub("", text)
    for _ in range(3):  # they may be nested
        text = _TEXT_COMMANDS.sub(r" \1 ", text)
    text = _PERCENT.sub("%", _BARE_POINT.sub("", text))
    text = _ENUMERATION.sub(",", text)
    text = _BARE_NAME.sub(r"\\\1 ", text)
    text = _ROOT_CALL.sub(r"\\sqrt{\1}", text)
    return text.strip().rstrip(".,;: \n").strip()


def without_thousands(text: str) -> str:
    """`1,080` as `1080`; not within brackets, where commas separate elements."""
    if any(bracket in text for bracket in "([{"):
        return text
    return _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)


def has_thousands_only(text: str) -> bool:
    """True for `1,080` and `2,000`: of a list no element would begin with a zero."""
    return without_thousands(text) != text and re.search(r",0\d\d", text) is not None


def tokens_of(text: str) -> list[str]:
    """LaTeX tokens with one name for each command, without those that mean nothing."""
    found: list[str] = _TOKEN.findall(text)
    tokens = (_SAME_COMMAND.get(token, token) for token in found)
    return [token for token in tokens if token not in _IGNORED]


def _argument(tokens: list[str], position: int, is_power: bool) -> int:
    """Where the argument that begins at `position` ends: a group, digits with their sign (powers), or one token."""
    if position >= len(tokens):
        return position
    if tokens[position] in ("{", "["):
        return group_end(tokens, position)
    end = position + 1
    if is_power and (tokens[position] == "-" or tokens[position].isdigit()):
        while end < len(tokens) and tokens[end].isdigit():
            end += 1
    return end


def group_end(tokens: list[str], opening: int) -> int:
    """The position after the bracket that closes the one at `opening`, of whatever kind (intervals mix them)."""
    depth = 0
    for position in range(opening, len(tokens)):
        if tokens[position] in _CLOSING:
            depth += 1
        elif tokens[position] in _CLOSING.values():
            depth -= 1
            if depth == 0:
                return position + 1
    return len(tokens)


def braced(tokens: list[str]) -> list[str]:
    """The tokens with braces round every argument of a power, an index, a fraction and a root."""
    result: list[str] = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        result.append(token)
        position += 1
        if token == "\\sqrt" and position < len(tokens) and tokens[position] == "[":
            end = group_end(tokens, position)
            result += tokens[position:end]
            position = end
        for _ in range({"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "^": 1, "_": 1}.get(token, 0)):
            end = _argument(tokens, position, is_power=token == "^")
            argument = tokens[position:end]
            if argument[:1] != ["{"]:
                argument = ["{", *argument, "}"]
            result += ["{", *braced(argument[1:-1]), "}"]
            position = end
    return result


def joined(tokens: list[str]) -> str:
    """LaTeX again: a space only where a command's name would run into a letter."""
    pieces = [
        token + " " if token[0] == "\\" and token[-1:].isalpha() and following[:1].isalpha() else token
        for token, following in zip(tokens, [*tokens[1:], ""], strict=True)
    ]
    return "".join(pieces)


def is_too_deep(tokens: list[str]) -> bool:
    """True for brackets nested deeper than in any answer: parsers take exponential time for them."""
    depth = deepest = 0
    for token in tokens:
        depth += (token in _CLOSING or token.startswith("\\begin")) - (token in _CLOSING.values())
        deepest = max(deepest, depth)
    # bars open or close, which only parsing tells: many are the worst of all
    return deepest > MAX_DEPTH or tokens.count("|") > MAX_BARS


def split(tokens: list[str], separators: tuple[str, ...]) -> list[list[str]]:
    """The parts between separators that stand in no brackets; empty parts are left out."""
    parts: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token in _CLOSING) - (token in _CLOSING.values())
        if depth <= 0 and token in separators:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]


def unwrapped(tokens: list[str]) -> tuple[str, str, list[str]] | None:
    """(opening, closing, content) if one pair of brackets holds all of the tokens."""
    if len(tokens) < 2 or tokens[0] not in _CLOSING or group_end(tokens, 0) != len(tokens):
        return None
    return (tokens[0], tokens[-1], tokens[1:-1]) if tokens[-1] in _CLOSING.values() else None


def rows_of_matrix(tokens: list[str]) -> list[list[list[str]]] | None:
    """The elements of a matrix, row by row, if the tokens are one and nothing else."""
    text = "".join(tokens)
    found = re.fullmatch(r"\\begin\{([a-zA-Z]*matrix|array)\}(?:\{[lcr|]*\})?.*\\end\{\1\}", text)
    if not found or tokens.count("\\begin") != 1:
        return None
    content = tokens[tokens.index("}") + 1 : len(tokens) - 1 - tokens[::-1].index("\\end")]
    if found[1] == "array" and content[:1] == ["{"]:
        content = content[group_end(content, 0) :]
    return [split(row, ("&",)) for row in split(content, ("\\\\",))]


def without_brackets(tokens: list[str]) -> list[str]:
    """The tokens without parentheses round a single element."""
    while (wrapped := unwrapped(tokens)) and wrapped[:2] in (("(", ")"), ("{", "}")):
        if len(split(wrapped[2], (",", ";"))) != 1:
            break
        tokens = wrapped[2]
    return tokens
