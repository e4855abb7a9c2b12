"""DAPO's rule for mathematics: the last `Answer:` line, normalised, compared as text; +1 or -1.

The rule of the DAPO runs, with every step of their normalisation (`reward_score/math_dapo.py` in verl, based on
lm-evaluation-harness' Minerva task; arXiv:2503.14476), because results are comparable only under the same rule. It
does not compare numbers: `25` differs from `025`, `27` from `27.0`, `1/2` from `\\frac{1}{2}`. For such answers use the
reward `math`.
"""

import re

from minpro_megatron.rewards.alternatives import alternatives
from minpro_megatron.rewards.registry import Grade

# The number of characters at the end of a response that are searched.
ANSWER_TAIL_CHARS = 300
BOXED_TAIL_CHARS = 100

_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
# In this order: later replacements see the result of earlier ones. Both lists also match inside words, as DAPO's do.
_REPLACED = [
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
]  # fmt: skip
_REMOVED = [
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
]  # fmt: skip
_REWRITTEN = [
    (re.compile(r".*?\$(.*?)\$.*"), r"$\1$"),
    (re.compile(r"\\text\{(.*?)\}"), r"\1"),
    (re.compile(r"\\textbf\{(.*?)\}"), r"\1"),
    (re.compile(r"\\overline\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
]


def normalise(answer: str) -> str:
    """The compared text. Example: `normalise("x = \\\\frac12 units") == "\\\\frac{1}{2}"`."""
    text = answer.rpartition("=")[2]
    for before, after in _REPLACED:
        text = text.replace(before, after)
    for expression in _REMOVED:
        text = text.replace(expression, "")
    for pattern, replacement in _REWRITTEN:
        text = pattern.sub(replacement, text)
    text = text.replace("$", "")
    without_commas = text.replace(",", "")
    return (without_commas if without_commas.isdigit() else text).strip()


def grade(response_text: str, answer: str) -> Grade:
    """+1 if the last `Answer:` line in the last 300 characters says `answer`, or one of several, else -1."""
    lines = _ANSWER_LINE.findall(response_text[-ANSWER_TAIL_CHARS:])
    if not lines:
        return Grade(-1.0)
    extracted = normalise(lines[-1])
    return Grade(1.0 if extracted in map(normalise, alternatives(answer)) else -1.0, extracted)


def grade_boxed(response_text: str, answer: str) -> Grade:
    """DAPO's strict variant: +1 if the last `\\boxed{}` in the last 100 characters is exactly `answer`, else -1."""
    extracted = _last_boxed(response_text[-BOXED_TAIL_CHARS:])
    return Grade(1.0 if extracted in alternatives(answer) else -1.0, extracted)


def _last_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{}`. Every brace counts, even after a backslash, as in DAPO's rule."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if text[position] == "}" and depth == 0:
            return text[start + len("\\boxed{") : position]
    return None
