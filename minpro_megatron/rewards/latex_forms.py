"""Splits a mathematical answer into tokens with a unique spelling, and into parts: lists, tuples, sets, matrices.

The result can be joined to LaTeX again, so that a symbolic parser can read it.
"""

import itertools
import re

MAX_DEPTH = 12
MAX_BARS = 16
MAX_PARTS = 64
# Separates digits that had white space between them: 2 5 is not a number.
GAP = " "

_TOKEN = re.compile(r"\\[a-zA-Z]+\*?|\\.|\S")
_SAME_COMMAND = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac", "\\dbinom": "\\binom", "\\tbinom": "\\binom",
    "\\geqslant": "\\ge", "\\geq": "\\ge", "\\leqslant": "\\le", "\\leq": "\\le", "\\neq": "\\ne", "\\times": "\\cdot",
    "\\ast": "\\cdot", "*": "\\cdot", "\\lbrace": "\\{", "\\rbrace": "\\}", "\\lbrack": "[", "\\rbrack": "]",
    "\\lparen": "(", "\\rparen": ")", "\\div": "/", "\\lt": "<", "\\gt": ">", "\\vert": "|", "\\lvert": "|",
    "\\rvert": "|", "\\varnothing": "\\emptyset", "\\operatorname*": "\\operatorname", "\\simeq": "\\approx",
    "\\vee": "\\lor", "\\mod": "\\bmod", "\\pod": "\\pmod", "\\doteq": "\\approx",
}  # fmt: skip
# Spacing, sizes and emphasis have no meaning.
_IGNORED = frozenset({
    "$", "\\$", "\\!", "\\,", "\\;", "\\:", "\\>", "\\ ", "~", "\\(", "\\)", "\\[", "\\]", "\\left", "\\right",
    "\\quad", "\\qquad", "\\displaystyle", "\\textstyle", "\\scriptstyle", "\\big", "\\Big", "\\bigl", "\\bigr",
    "\\Bigl", "\\Bigr", "\\bigg", "\\Bigg", "\\biggl", "\\biggr", "\\limits", "\\nolimits", "\\rm", "\\bf", "\\it",
    "\\large", "\\Large", "\\LARGE", "\\huge", "\\small", "\\normalsize", "\\middle", "\\hfill", "\\degree", "`",
    "\\bfseries", "\\underline", "\\uline", "\\ensuremath", "\\mathop", "\\mathord", "\\pmb", "\\smash", "\\boxed",
})  # fmt: skip
# The number of arguments without meaning of these commands.
_IGNORED_ARGUMENTS = {
    "\\color": 1, "\\textcolor": 1, "\\colorbox": 1, "\\fcolorbox": 2, "\\hspace": 1, "\\vspace": 1, "\\phantom": 1,
    "\\hphantom": 1, "\\vphantom": 1, "\\label": 1, "\\tag": 1,
}  # fmt: skip
_INFIX = {"\\over": "\\frac", "\\choose": "\\binom"}
_NUM_ARGUMENTS = {"\\frac": 2, "\\binom": 2, "\\sqrt": 1, "^": 1, "_": 1}
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}


def tokens_of(text: str) -> list[str]:
    """LaTeX tokens with one name per command, without meaningless commands, and with braces around every argument."""
    tokens: list[str] = []
    end = -1
    is_apart = False
    for match in _TOKEN.finditer(text):
        token = _SAME_COMMAND.get(match[0], match[0])
        is_apart = is_apart or (match.start() > end and token != "\\!") or token == "$"
        end = match.end()
        if token in _IGNORED:
            is_apart = is_apart or token != "\\!"
            continue
        if is_apart and token.isdecimal() and tokens and tokens[-1].isdecimal():
            tokens.append(GAP)
        tokens.append(token)
        is_apart = False
    if not _IGNORED_ARGUMENTS.keys().isdisjoint(tokens):
        tokens = _without_ignored_arguments(tokens)
    if not _INFIX.keys().isdisjoint(tokens):
        tokens = _without_infix_commands(tokens)
    return _without_gaps(_braced(tokens))


def _without_ignored_arguments(tokens: list[str]) -> list[str]:
    result: list[str] = []
    position = 0
    while position < len(tokens):
        count = _IGNORED_ARGUMENTS.get(tokens[position])
        if count is None:
            result.append(tokens[position])
        position += 1
        for _ in range(count or 0):
            position = _argument(tokens, position, is_power=False)
    return result


def _without_infix_commands(tokens: list[str]) -> list[str]:
    """`{n \\choose k}` as `\\binom{n}{k}`, for the innermost groups first."""
    stack: list[list[str]] = [[]]
    for token in tokens:
        if token == "{":
            stack.append([])
        elif token == "}" and len(stack) > 1:
            group = stack.pop()
            prefixed = _prefixed(group)
            stack[-1] += ["{", *prefixed, "}"] if prefixed is group else prefixed
        else:
            stack[-1].append(token)
    result = _prefixed(stack[0])
    for group in stack[1:]:
        result += ["{", *_prefixed(group)]
    return result


def _prefixed(group: list[str]) -> list[str]:
    command = next((token for token in group if token in _INFIX), None)
    if command is None:
        return group
    position = group.index(command)
    return [_INFIX[command], "{", *group[:position], "}", "{", *group[position + 1 :], "}"]


def _argument(tokens: list[str], position: int, is_power: bool) -> int:
    """The end of the argument that begins at `position`: a group, digits with their sign (powers), or one token."""
    if position >= len(tokens):
        return position
    if tokens[position] in ("{", "["):
        return group_end(tokens, position)
    end = position + 1
    if is_power and (tokens[position] == "-" or tokens[position].isdecimal()):
        while end < len(tokens) and tokens[end].isdecimal():
            end += 1
    return end


def group_end(tokens: list[str], opening: int) -> int:
    """The position after the bracket that closes the one at `opening`, of any kind (intervals mix them)."""
    depth = 0
    for position in range(opening, len(tokens)):
        if tokens[position] in _CLOSING:
            depth += 1
        elif tokens[position] in _CLOSING.values():
            depth -= 1
            if depth == 0:
                return position + 1
    return len(tokens)


def _braced(tokens: list[str]) -> list[str]:
    """The tokens with braces around every argument of a power, an index, a fraction and a root."""
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
        for _ in range(_NUM_ARGUMENTS.get(token, 0)):
            if position < len(tokens) and tokens[position] == GAP:
                position += 1
            end = _argument(tokens, position, is_power=token == "^")
            argument = tokens[position:end]
            if argument[:1] != ["{"]:
                argument = ["{", *argument, "}"]
            result += ["{", *_braced(argument[1:-1]), "}"]
            position = end
    return result


def _without_gaps(tokens: list[str]) -> list[str]:
    """Interprets white space between digits as thousands (12 000) or mixed numbers (2 3/4); otherwise as a GAP."""
    if GAP not in tokens:
        return tokens
    runs: list[str] = []
    for token in tokens:  # joins each run of digits into one token
        if token.isdecimal() and runs and runs[-1].isdecimal():
            runs[-1] += token
        else:
            runs.append(token)
    result: list[str] = []
    position = 0
    while position < len(runs):
        end, reading = _spaced_number(runs, position, result[-1:])
        result += reading
        position = end
    return result


def _spaced_number(runs: list[str], position: int, before: list[str]) -> tuple[int, list[str]]:
    """(end position, tokens) of the number that begins at `position`."""
    first = runs[position]
    if first == GAP and not (before and before[0].isdecimal()):
        return position + 1, []  # after an argument: \frac 1 2
    if not first.isdecimal() or before in (["."], [GAP], ["/"]):
        return position + 1, list(first) if first.isdecimal() else [first]
    end = position + 1
    while runs[end : end + 1] == [GAP] and re.fullmatch(r"\d{3}", "".join(runs[end + 1 : end + 2])):
        end += 2
    digits = [run for run in runs[position:end] if run != GAP]
    if len(digits) > 1 and len(first) <= 3 and runs[end : end + 1] not in ([GAP], ["/"]):
        return end, list("".join(digits))
    whole = runs[position + 1 : position + 5]
    if len(whole) == 4 and whole[0] == GAP and whole[2] == "/" and whole[1].isdecimal() and whole[3].isdecimal():
        follows = runs[position + 5 : position + 6]
        if int(whole[1][:400]) < int(whole[3][:400]) and follows not in (["."], ["^"], ["!"], ["/"], [GAP], ["_"]):
            fraction = ["\\frac", "{", *whole[1], "}", "{", *whole[3], "}"]
            return position + 5, [*first, *fraction]
    return position + 1, list(first)


def joined(tokens: list[str]) -> str:
    """The tokens as LaTeX, with a space only where a command's name would run into a letter."""
    pieces = [
        token + " " if token[0] == "\\" and token[-1:].isalpha() and following[:1].isalpha() else token
        for token, following in itertools.zip_longest(tokens, tokens[1:], fillvalue="")
    ]
    return "".join(pieces)


def is_too_deep(tokens: list[str]) -> bool:
    """True if brackets are nested deeper than in any answer: parsers take exponential time for them."""
    depth = deepest = 0
    for token in tokens:
        depth += (token in _CLOSING or token.startswith("\\begin")) - (token in _CLOSING.values())
        deepest = max(deepest, depth)
    # Whether a bar opens or closes is known only after parsing, so many bars are the worst case.
    return deepest > MAX_DEPTH or tokens.count("|") > MAX_BARS


def split(tokens: list[str], separators: tuple[str, ...]) -> list[list[str]]:
    """The parts between separators outside of brackets; empty parts are skipped."""
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
    """(opening, closing, content) if one pair of brackets encloses all tokens."""
    if len(tokens) < 2 or tokens[0] not in _CLOSING or group_end(tokens, 0) != len(tokens):
        return None
    return (tokens[0], tokens[-1], tokens[1:-1]) if tokens[-1] in _CLOSING.values() else None


def rows_of_matrix(tokens: list[str]) -> list[list[list[str]]] | None:
    """The elements of a matrix, row by row, if the tokens are exactly one matrix."""
    text = "".join(tokens)
    found = re.fullmatch(r"\\begin\{([a-zA-Z]{0,20}matrix|array)\}(?:\{[lcr|]*\})?.*\\end\{\1\}", text)
    if not found or tokens.count("\\begin") != 1:
        return None
    content = tokens[tokens.index("}") + 1 : len(tokens) - 1 - tokens[::-1].index("\\end")]
    if found[1] == "array" and content[:1] == ["{"]:
        content = content[group_end(content, 0) :]
    return [split(row, ("&",)) for row in split(content, ("\\\\",))]


def without_brackets(tokens: list[str]) -> list[str]:
    """The tokens without parentheses around a single element."""
    while (wrapped := unwrapped(tokens)) and wrapped[:2] in (("(", ")"), ("{", "}")):
        if len(split(wrapped[2], (",", ";"))) != 1:
            break
        tokens = wrapped[2]
    return tokens
