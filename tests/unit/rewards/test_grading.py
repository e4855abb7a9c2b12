"""What the reward `math` takes for equal: a golden table of answer forms, and the benchmarks' own answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ground_truths import renderings, wrong_answers
from minpro_megatron.rewards.mathematics import equal, grade

FOLDER = Path(__file__).parent


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


TRUTHS = [(row["data_source"], row["ground_truth"]) for row in rows("grading_truths.jsonl")]
# Those that need algebra for some rendering take 5 to 700 ms each: here every 20th; all of them are graded by
# `python -m benchmarks.grading --truths`, which lists failures.
NUMBERS = [truth for _, truth in TRUTHS if truth.lstrip("-").replace(",", "").replace(".", "").isdigit()]
FORMULAS = [truth for _, truth in TRUTHS if truth not in set(NUMBERS)]


@pytest.mark.parametrize("row", rows("grading_golden.jsonl"), ids=lambda row: f"{row['answer']}|{row['given']}"[:60])
def test_golden_table(row: dict[str, Any]) -> None:
    assert equal(row["answer"], row["given"]) is row["equal"]


def responses(kind: str) -> list[Any]:
    """The rows of one kind; of variations that need algebra more than five are left to the long tests."""
    found = [row for row in rows("grading_responses.jsonl") if row["kind"] == kind]
    reported = [pytest.param(row) for row in found if row["from"] == "report"]
    variations = [row for row in found if row["from"] == "variation"]
    short = 8 if kind in ("formulas with branches", "other forms") else len(variations)
    marked = [pytest.param(row, marks=pytest.mark.long) for row in variations[short:]]
    return reported + [pytest.param(row) for row in variations[:short]] + marked


# Rows "from": "report" were written after public bug reports of other graders, "variation" after these.
KINDS = sorted({row["kind"] for row in rows("grading_responses.jsonl")})


@pytest.mark.parametrize("row", [row for kind in KINDS for row in responses(kind)])
def test_responses_after_bug_reports(row: dict[str, Any]) -> None:
    assert grade(row["response"], row["answer"]).reward == row["reward"]


def test_the_table_has_every_benchmark() -> None:
    sources = {source for source, _ in TRUTHS}
    assert sources == {"aime24", "aime25", "amc23", "gsm8k", "minerva_math", "olympiadbench", "math_dapo"}
    assert len(TRUTHS) == len(set(TRUTHS)) > 1800


@pytest.mark.parametrize("part", range(8))
def test_every_number_of_the_benchmarks_equals_itself_and_no_other(part: int) -> None:
    for truth in NUMBERS[part::8]:
        responses = renderings(truth)
        assert len(responses) >= 4
        assert [text for text in responses if grade(text, truth).reward != 1.0] == []
        assert [text for text in wrong_answers(truth) if grade(text, truth).reward != 0.0] == []


@pytest.mark.parametrize("part", range(4))
def test_every_formula_of_the_benchmarks_equals_itself(part: int) -> None:
    for truth in FORMULAS[part::4]:
        assert [text for text in renderings(truth)[:4] if grade(text, truth).reward != 1.0] == []


@pytest.mark.parametrize("truth", FORMULAS[7::20], ids=lambda truth: truth[:40])
def test_formulas_that_algebra_has_to_tell_apart(truth: str) -> None:
    assert [text for text in renderings(truth) if grade(text, truth).reward != 1.0] == []
    assert [text for text in wrong_answers(truth) if grade(text, truth).reward != 0.0] == []


@pytest.mark.parametrize(
    ("response", "extracted", "reward"),
    [
        ("So 3.\nAnswer: 4", "4", 1.0),
        ("Answer: 3\nNo, wait.\nAnswer: $4$", "$4$", 1.0),
        ("Answer: 4\nAnswer: 3", "3", 0.0),
        ("**Final answer:** 4", "4", 1.0),
        ("Answer:\n$$\n4\n$$", "4", 1.0),
        ("Answer: \\[ 4 \\]", "4", 1.0),
        (r"answer : the value is $\boxed{4}$.", "4", 1.0),
        (r"Answer: 3, that is \boxed{4}", "4", 1.0),
        (r"\boxed{4}", "4", 1.0),
        (r"first \boxed{3}, then \boxed{\frac{8}{2}} at last", r"\frac{8}{2}", 1.0),
        (r"\boxed{4} but" "\n" "Answer: 3", "3", 0.0),
        ("4", None, 0.0),
        ("", None, 0.0),
        ("Answer:", None, 0.0),
        (r"\boxed{4", None, 0.0),
    ],
)
def test_where_the_answer_is_looked_for(response: str, extracted: str | None, reward: float) -> None:
    graded = grade(response, "4")
    assert (graded.extracted, graded.reward) == (extracted, reward)


def test_boxes_of_one_enumeration_are_one_answer() -> None:
    assert grade(r"$x=\boxed{1}$ or $x=\boxed{2}$", "2").reward == 0.0  # both are given as the answer
    assert grade(r"$x=\boxed{1}$, so $y=2x=\boxed{2}$", "2").reward == 1.0
    assert grade(r"$\boxed{1}$ and $\boxed{2}$.", "2,1").reward == 1.0
    assert grade(r"\boxed{1}, \boxed{2}", "1").reward == 0.0


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_an_empty_answer_is_a_fault_of_the_data(answer: str) -> None:
    with pytest.raises(ValueError, match="answer: it is empty"):
        grade("Answer: 4", answer)
