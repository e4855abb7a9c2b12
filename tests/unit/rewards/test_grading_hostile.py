"""Expressions made to take for ever: refused, or left to the limits of the grading process; never evaluated as code."""

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sympy.parsing import sympy_parser

from minpro_megatron.rewards import exact_numbers, intervals, latex_forms, latex_text, sentences, symbolic, units
from minpro_megatron.rewards.extraction import extract_answer
from minpro_megatron.rewards.mathematics import grade

LIMIT_S = 5.0  # reward.timeout_s, of processor time: other processes may hold the machine
HOSTILE = {
    "tower": "9**9**9**9",
    "tower in LaTeX": "9^{9^{9^{9}}}",
    "huge power": "10^{10^{10}}",
    "power of a sum": "(x+y+z+1)^{5000}",
    "root of a tower": r"\sqrt{9^{9^{9^9}}}",
    "exponent of a numeral": "1e999999999",
    "factorials": "9!!!!",
    "factorials of factorials": "5" + "!" * 40,
    "factorial of a power": "(10^9)!",
    "binomial": r"\binom{10^{9}}{10^{8}}",
    "gamma": r"\Gamma(10^{9})",
    "binomial of a root": r"\binom{8}{\sqrt[3]{7}}",
    "factorial of a root": r"(900\sqrt{7})!",
    "factorial of a sum of roots": r"(\sqrt{7}+\pi^{3})!",
    "sum": r"\sum_{n=1}^{10^9} n",
    "integral": r"\int_0^1 e^{-x^2} dx",
    "matrix": r"\operatorname{eye}(10^9)",
    "parentheses": "(" * 400 + "1" + ")" * 400,
    "parentheses as deep as allowed": "(x+" * 11 + "1" + ")" * 11,
    "fractions": r"\frac{1}{" * 200 + "1" + "}" * 200,
    "roots": r"\sqrt{" * 150 + "2" + "}" * 150,
    "a megabyte of digits": "9" * 2**20,
    "as many digits as are looked at": "9" * 900,
    "a megabyte of spaces": "1" + " " * 2**20 + "2",
    "dollars": "$" * 2**20,
    "answers": "Answer: " * 2**17,
    "open boxes": r"\boxed{" * 2**17,
    "open braces": "{" * 900,
    "bars": "|x" * 300,
    "signs": "-" * 400 + "1",
    "text in text": r"\text{" * 150,
    "list": ",".join("x" for _ in range(400)),
    "control characters": "\x00\x1b[2J\u202e" * 90,
    "a chain of divisions": "1" + "/m/s" * 40,
    "units divided by units": "m/s" * 20,
    "products of words": "miles per " * 98,
    "mixed numbers": "½" * 980,
}


@pytest.mark.parametrize("answer", ["7", "x^{2}+1", "(1,2)"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_expressions_end_within_the_limit(name: str, answer: str) -> None:
    start = time.process_time()
    assert grade(f"Answer: {HOSTILE[name]}", answer).reward == 0.0
    assert time.process_time() - start < LIMIT_S


# What the patterns of extraction and normalisation look for: each is repeated as far as an answer may be long.
PIECES = [
    " ", "\t", "\n", "\u00a0", "a", "1", "9", ",", ".", "/", "-", "*", "**", "$", "$$", "\\", "{", "}", "(",
    "[", "|", "^", "_", "!", "=", "<", "%", "~", "\\ ", "\\!", "\\\\", "\\\\[1pt]", "1 ", "1 000 ", "1,000",
    "1 1/2 ", "½", "²", "°", "\\degree ", "^\\circ ", "0.\\overline{3}", "\\dot{1}", "1e5", "10^", "m/s", "/m",
    "m ", "5 feet ", "miles per ", "square ", "$5$ s", "and ", "or ", "is ", "is not ", "the ", "not ",
    "million ", "1 million ", "mod ", "(mod ", "\\pmod", "\\approx ", "=1", "\\text{", "\\text{ and }",
    "\\color{", "\\over ", "{a\\over ", "\\choose ", "\\frac", "\\frac{", "\\sqrt[", "\\sqrt(", "\\boxed",
    "\\boxed{", "\\boxed{1}", "\\boxed 1", "\\fbox{", "Answer:", "the answer ", "# ", "```", "---\n", "<think>",
    "</think>", "<|a|>", "\\begin{pmatrix}", "\\end{pmatrix}", "\\left.", "\\pm ", "\\cup ", "\\in ", "f(x)=",
    "x_{", "n!", "٣", "①",
]  # fmt: skip
AROUND = [("", ""), ("1", "2"), ("5 ", " x"), ("$", "$"), ("is ", "")]


def read_without_algebra(text: str) -> None:
    line = latex_text.one_line(text)
    cleaned = latex_text.clean(units.with_marked_compounds(sentences.without_words(line)))
    for one, other in (units.with_marked_units("5", cleaned), units.with_marked_units(cleaned, "5")):
        latex_forms.joined(latex_forms.tokens_of(one))
        latex_forms.joined(latex_forms.tokens_of(other))
    exact_numbers.exact_number(cleaned)
    intervals.read_intervals(latex_forms.tokens_of(cleaned))


def processor_seconds(function: Callable[[str], object], text: str) -> float:
    start = time.process_time()
    function(text)
    return time.process_time() - start


@pytest.mark.parametrize(
    "function",
    [pytest.param(read_without_algebra, marks=pytest.mark.long), latex_text.clean, sentences.without_words],
)
def test_normalisation_takes_no_time_that_grows_faster_than_the_text(function: Callable[[str], object]) -> None:
    slow = {}
    for piece, (before, after) in itertools.product(PIECES, AROUND):
        text = before + piece * (990 // len(piece)) + after
        if (seconds := processor_seconds(function, text)) > 0.25:
            slow[text[:30]] = seconds
    assert slow == {}


@pytest.mark.parametrize("before", ["", "Answer: ", "\\boxed{", "the answer"])
def test_extraction_takes_no_time_that_grows_faster_than_the_text(before: str) -> None:
    slow = {}
    for piece in PIECES:
        text = before + piece * (20_000 // len(piece))
        if (seconds := processor_seconds(extract_answer, text)) > 0.25:
            slow[piece] = seconds
    assert slow == {}


@pytest.mark.parametrize("before", ["", "x" * 250, "a" + " " * 250, "Answer: 5" + " " * 250])
def test_white_space_costs_nothing(before: str) -> None:
    start = time.process_time()
    for space in (" ", "\t", "\u00a0", "\n", " \t"):
        assert grade(f"Answer: {before}{space * 500}and then{space * 500}", "7").reward == 0.0
    assert time.process_time() - start < 1.0


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_grading_of_random_pieces_ends_within_the_limit(seed: int) -> None:
    chosen = random.Random(seed)
    for _ in range(20):
        pieces = "".join(chosen.choices(PIECES, k=chosen.randint(2, 5)))
        text = (pieces * 990)[: chosen.choice([40, 200, 980])]
        answer = chosen.choice(["7", "x^{2}+1", "(1,2)", "x<3", "5 cm", r"\frac{1}{3}", "|x|", r"3 \pmod 7"])
        assert processor_seconds(lambda response, answer=answer: grade(response, answer), f"Answer: {text}") < LIMIT_S


@pytest.mark.parametrize("latex", ["9^{9^{9^{9}}}", "(10^{9})!", "(2^{100000})^{2}"])
def test_values_of_too_many_digits_are_refused_before_they_are_computed(latex: str) -> None:
    with pytest.raises(symbolic.RefusedError):
        symbolic.equal(latex, "7")


@pytest.mark.parametrize(
    "code", ["__import__('os')", "Integer (1 ).__class__", "Symbol ('x' )", "Integer (1 )+Integer (1 )", "open", ""]
)
def test_sympy_evaluates_no_text(code: str) -> None:
    with pytest.raises(ValueError, match="may not be evaluated"):
        sympy_parser.eval_expr(code, {}, {})
    assert sympy_parser.eval_expr("Integer (12 )", {}, {}) == 12


def test_no_response_runs_code(tmp_path: Path) -> None:
    path = tmp_path / "touched"
    for call in (f'__import__("pathlib").Path("{path}").touch()', f"open('{path}','w')"):
        for text in (call, f"\\max({call}, 2)", f"\\operatorname{{{call}}}(1)", f"f({call})", f"{{{call}}}^2"):
            grade(f"Answer: {text}", "f(2)")
    assert not path.exists()
