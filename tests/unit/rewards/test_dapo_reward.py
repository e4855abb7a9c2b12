"""DAPO's rule: which line counts, what is normalised away, +1 and -1."""

import pytest

from minpro_megatron.rewards.dapo import grade, grade_boxed, normalise


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("Answer: 25", "25", 1.0),
        ("answer :25", "25", 1.0),
        ("Answer: 24\nAnswer: 25", "25", 1.0),
        ("Answer: 25\nAnswer: 24", "25", -1.0),
        ("Answer:\n25", "25", 1.0),
        ("Answer: $25$", "25", 1.0),
        ("Answer: x = 25", "25", 1.0),
        ("Answer: \\boxed{25}", "25", 1.0),
        ("Answer: 25 degrees", "25", 1.0),
        ("Answer: 1,250", "1250", 1.0),
        ("Answer: \\frac12", "\\frac{1}{2}", 1.0),
        ("Answer: 025", "25", -1.0),  # no numbers, only texts
        ("Answer: 25.0", "25", -1.0),
        ("Answer: 25.", "25", -1.0),
        ("**Answer:** 25", "25", -1.0),
        ("\\boxed{25}", "25", -1.0),
        ("25", "25", -1.0),
        ("", "25", -1.0),
        ("Answer: `$13$`", "13", 1.0),
        ("Answer: $\\frac12$", "\\frac{1}{2}", 1.0),
        ("Answer: $3,159$", "3159", 1.0),
        ("Answer: 7<|im_end|>", "7", -1.0),
        ("answer :  $x = 7$ units", "7", 1.0),
        ("Answer: 25\n" + "x" * 289, "25", 1.0),
        ("Answer: 25\n" + "x" * 299, "25", -1.0),  # beyond the last 300 characters
    ],
)
def test_rule(response: str, answer: str, reward: float) -> None:
    assert grade(response, answer).reward == reward


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("3", "3"),
        (" 3 ", "3"),
        ("a = b = 3", "3"),
        ("The answer is $3$ units", "3"),
        ("\\text{even}", "even"),
        ("\\textbf{3}", "3"),
        ("\\overline{AB}", "AB"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("\\sqrt{2}", "\\sqrt{2}"),
        ("12\\text{ m}", "12"),
        ("90^\\circ", "90"),
        ("10{,}000", "10000"),
        ("1,000", "1000"),
        ("1,x", "1,x"),
        ("\\$3", "3"),
        ("30\\%", "30\\%"),
        ("5\\mbox{ cm}", "5"),
        ("(3, 2)", "(3,2)"),
        ("1,\\text{and} x", "1,x"),
    ],
)
def test_normalisation(answer: str, normal: str) -> None:
    assert normalise(answer) == normal


def test_the_compared_part_is_reported() -> None:
    assert grade("Answer: $7$ km", "8").extracted == "7"
    assert grade("none", "8").extracted is None


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"\boxed{25}", 1.0),
        (r"\boxed{24} \boxed{25}", 1.0),
        (r"\boxed{ 25}", -1.0),
        (r"\boxed{25", -1.0),
        ("Answer: 25", -1.0),
        (r"\boxed{25}" + "x" * 90, 1.0),
        (r"\boxed{25}" + "x" * 91, -1.0),
    ],
)
def test_strict_box(response: str, reward: float) -> None:
    assert grade_boxed(response, "25").reward == reward


@pytest.mark.parametrize(
    ("response", "extracted"),
    [
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\{1}", None),  # an escaped brace counts as well, as in verl's rule
        (r"\boxed{1\}}", "1\\"),
        (r"\boxed{\boxed{1}}", "1"),
        (r"} \boxed{1}", "1"),
    ],
)
def test_the_strict_box_counts_every_brace(response: str, extracted: str | None) -> None:
    assert grade_boxed(response, "").extracted == extracted
