"""The mathematics data sets: the real files, every schema, what is dropped and counted, and damaged rows."""

import json
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from minpro_megatron.commands import prepare as command
from minpro_megatron.config.instructions import DAPO_AFTER, DAPO_BEFORE
from minpro_megatron.prompt_sets import answers
from minpro_megatron.prompt_sets.mathematics import SETS
from minpro_megatron.prompts.prompts import load_prompts
from tests.support.rollout_fakes import write_rows

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"


def prepare(name: str, source: Path, output: Path, *options: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The prompt rows and the report."""
    assert command.main([name, "--input", str(source), "--output", str(output), *options]) == 0
    made = [json.loads(line) for line in output.read_text().splitlines()]
    report = json.loads(output.with_suffix(".report.json").read_text())
    assert report["rows"] == len(made) + sum(report["dropped"].values())
    assert report["kept"] == len(made)
    return made, report


def verl_row(question: str, answer: str, *, wrapped: bool = True) -> dict[str, Any]:
    content = f"{DAPO_BEFORE}{question}{DAPO_AFTER}" if wrapped else question
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": "user"}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
    }


def write_parquet(path: Path, table: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(table), path)
    return path


@pytest.mark.parametrize(
    ("name", "file", "count", "sample"),
    [
        ("gsm8k", "gsm8k_test.jsonl", 1319, ("Janet\u2019s ducks lay 16", "18")),
        ("aime24", "aime24.jsonl", 30, ("Every morning Aya goes", "204")),
        ("aime24", "aime24_dapo_schema.parquet", 30, ("Every morning Aya goes", "204")),
        ("dapo", "aime24_dapo_schema.parquet", 30, ("Find the largest possible real part of", "540")),
        ("aime25", "aime25.parquet", 30, ("Find the sum of all integer bases", "70")),
        ("amc23", "amc23.jsonl", 40, ("Cities $A$ and $B$ are $45$ miles", "27")),
        ("olympiad", "olympiadbench.jsonl", 675, ("Xenia and Sergey play the following game.", "2")),
        ("minerva", "minerva_math.jsonl", 272, ("Each of the two Magellan telescopes", "1.6")),
    ],
)
def test_the_real_files(tmp_path: Path, name: str, file: str, count: int, sample: tuple[str, str]) -> None:
    if not (DATA / file).exists():
        pytest.skip(f"needs {DATA / file}")
    made, _ = prepare(name, DATA / file, tmp_path / "out.jsonl")
    assert len(made) == count
    assert sum(row["prompt"].startswith(sample[0]) and row["answer"] == sample[1] for row in made) == 1
    for row in made:
        assert (row["source"], list(row)) == (name, ["id", "source", "prompt", "answer"])
        assert "Answer: $Answer" not in row["prompt"]
        assert row["answer"] == row["answer"].strip() != ""
    assert [prompt.id for prompt in load_prompts(tmp_path / "out.jsonl", "data.train_file")] == sorted(
        row["id"] for row in made
    )


def test_the_dapo_schema_holds_each_question_32_times(tmp_path: Path) -> None:
    if not (DATA / "aime24_dapo_schema.parquet").exists():
        pytest.skip(f"needs {DATA / 'aime24_dapo_schema.parquet'}")
    _, report = prepare("dapo", DATA / "aime24_dapo_schema.parquet", tmp_path / "out.jsonl")
    assert (report["rows"], report["dropped"]) == (960, {"the same question again": 930})


def test_copies_are_written_once_and_contradictions_not_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in DAPO-Math-17K: every question many times, a few of them with two answers."""
    table = [verl_row(f"Question {n}?", str(n)) for n in range(200)] * 10
    table += [verl_row("Question  7?\n", "7"), verl_row("Question 8?", " 8 "), verl_row("e\u0301?", "1")]
    table += [verl_row("\u00e9?", "1"), verl_row("Question 9?", "10"), verl_row("Question 11?", "12")] * 2
    made, report = prepare("dapo", write_parquet(tmp_path / "in.parquet", table), tmp_path / "out.jsonl")
    assert len(made) == 199
    kept = {row["prompt"]: row["answer"] for row in made}
    assert kept["Question 7?"] == "7"
    assert not kept.keys() & {"Question 9?", "Question 11?"}
    several = "the question comes with several answers"
    assert report["dropped"] == {"the same question again": 9 * 198 + 2 + 2, several: 24}
    assert report["conflicting_questions"] == 2
    assert {"reason": several, "prompt": "Question 9?", "answers": ["9", "10"]} in report["listed"]
    account = capsys.readouterr().out
    assert "2009 rows in in.parquet" in account
    assert "24 dropped: the question comes with several answers" in account
    assert "199 prompts in" in account


def test_ids_do_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    table = [verl_row(f"Question {n}?", str(n)) for n in range(50)]
    prepare("dapo", write_parquet(tmp_path / "a.parquet", table), tmp_path / "a.jsonl")
    prepare("dapo", write_parquet(tmp_path / "b.parquet", table[::-1] + table[:3]), tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_processed_copy_of_dapo(tmp_path: Path) -> None:
    table = [{"prompt": "1+1?", "solution": "2", "data_source": "math_dapo"}]
    table += [{"prompt": f"{DAPO_BEFORE}2+2?{DAPO_AFTER}", "solution": "4", "data_source": "math_dapo"}]
    made, _ = prepare("dapo", write_parquet(tmp_path / "in.parquet", table), tmp_path / "out.jsonl")
    assert Counter((row["prompt"], row["answer"]) for row in made) == Counter([("1+1?", "2"), ("2+2?", "4")])


def test_only_dapos_own_rows_must_hold_its_instruction(tmp_path: Path) -> None:
    table = [verl_row("1+1?", "2", wrapped=False), verl_row("2+2?", "004")]
    made, _ = prepare("aime25", write_parquet(tmp_path / "in.parquet", table), tmp_path / "out.jsonl")
    assert Counter((row["prompt"], row["answer"]) for row in made) == Counter([("1+1?", "2"), ("2+2?", "4")])


def test_math500(tmp_path: Path) -> None:
    rows = [
        {"problem": "Convert.", "solution": "So \\boxed{x}.", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"},
        {"problem": "Which?", "solution": "So $\\boxed{\\text{A, \\{B\\}}}$ or \\boxed{\\frac{1}{\\sqrt{2}}}."},
    ]
    made, _ = prepare("math500", write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert {row["answer"] for row in made} == {"\\left( 3, \\frac{\\pi}{2} \\right)", "\\frac{1}{\\sqrt{2}}"}


def test_olympiadbench_keeps_its_text_only_open_english_mathematics(tmp_path: Path) -> None:
    def row(number: int, **changes: Any) -> dict[str, Any]:
        return {"id": number, "question": f"Find {number}.", "context": None, "final_answer": ["$2$,$4$"]} | changes

    table = [
        row(1, context="Let $x$ be 1.", language="English", modality="Text-only", question_type="Open-ended"),
        row(2, final_answer=["$\\frac{1}{2}$."], unit="km"),
        row(3, final_answer=["1", "2"]),
        row(4, final_answer=None, question_type="Theorem proof"),
        row(5, modality="Multimodal"),
        row(6, question="See <image_1>."),
        row(7, language="Chinese"),
        row(8, question="\u6c42 $x$."),
        row(9, subject="Physics"),
        row(10, final_answer=[]),
    ]
    made, report = prepare("olympiad", write_rows(tmp_path / "in.jsonl", table), tmp_path / "out.jsonl")
    assert Counter((row["prompt"], row["answer"]) for row in made) == Counter(
        [("Let $x$ be 1.\n\nFind 1.", "$2$,$4$"), ("Find 2.", "\\frac{1}{2}"), ("Find 3.", "1, 2")]
    )
    assert report["dropped"] == {
        "not open-ended: a proof, without a final answer": 2,
        "not text only": 2,
        "not in English": 2,
        "not mathematics": 1,
    }
    assert {"reason": "not mathematics", "file": "in.jsonl", "row": 9} in report["listed"]


def test_any_file_by_its_columns(tmp_path: Path) -> None:
    table = [
        {"q": {"text": "1+1?"}, "a": 2.0, "rate": 0.25, "cut": "First"},
        {"q": {"text": "1+1?"}, "a": 2, "rate": 0.25, "cut": "Second"},
        {"q": {"text": "1+1?"}, "a": 2, "rate": None, "cut": None},
    ]
    columns = (
        "--prompt-column",
        "q.text",
        "--answer-column",
        "a",
        "--pass-rate-column",
        "rate",
        "--prefix-column",
        "cut",
    )
    made, _ = prepare("custom", write_parquet(tmp_path / "in.parquet", table), tmp_path / "mine.jsonl", *columns)
    assert Counter((row.get("prefix"), row.get("pass_rate")) for row in made) == Counter(
        [("First", 0.25), ("Second", 0.25), (None, None)]
    )
    assert {(row["source"], row["prompt"], row["answer"]) for row in made} == {("mine", "1+1?", "2")}
    prompts = load_prompts(tmp_path / "mine.jsonl", "data.train_file")
    assert {prompt.prefix for prompt in prompts} == {"First", "Second", ""}


def test_the_other_columns_and_a_system_message_are_kept(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    table = [{"q": chat, "a": {"b": "2", "style": "rule"}, "level": 3, "day": date(2026, 1, 2), "no": None}]
    columns = ("--prompt-column", "q", "--answer-column", "a.b")
    path = write_parquet(tmp_path / "in.parquet", table)
    (row,), _ = prepare("custom", path, tmp_path / "mine.jsonl", *columns)
    assert (row["prompt"], row["system"]) == ("1+1?", "Be brief.")
    assert row["metadata"] == {"a": {"b": "2", "style": "rule"}, "level": 3, "day": "2026-01-02"}
    (prompt,) = load_prompts(tmp_path / "mine.jsonl", "data.train_file")
    assert prompt.system == "Be brief."
    (row,), _ = prepare("custom", path, tmp_path / "mine.jsonl", *columns, "--no-metadata")
    assert "metadata" not in row


CUSTOM = ("--prompt-column", "q", "--answer-column", "a.b", "--pass-rate-column", "r", "--prefix-column", "p")


@pytest.mark.parametrize(
    ("name", "row", "field", "rule"),
    [
        ("dapo", verl_row("1+1?", "2", wrapped=False), "prompt", "must begin with DAPO's instruction"),
        ("dapo", verl_row("1+1?", ""), "reward_model", "not empty"),
        ("dapo", verl_row("1+1?", "2") | {"reward_model": None}, "reward_model", "reward_model.ground_truth (verl's"),
        ("dapo", verl_row("1+1?", "2") | {"prompt": []}, "prompt", "must be one message of the role user"),
        ("dapo", verl_row("1+1?", "2") | {"prompt": [{"role": "system", "content": "x"}]}, "prompt", "role user"),
        ("dapo", verl_row("1+1?", "2") | {"prompt": [{"role": "user"}]}, "content", "is missing"),
        ("dapo", {"solution": "2"}, "prompt", "is missing"),
        ("dapo", {"prompt": "1+1?"}, "solution", "must be a text or a number"),
        ("gsm8k", {"question": "1?", "answer": "so it is 1"}, "answer", "must end with a line '#### <number>'"),
        ("gsm8k", {"question": "1?", "answer": "so\n#### 1 and"}, "answer", "is the solution cut off"),
        ("gsm8k", {"question": 5, "answer": "so\n#### 1"}, "question", "must be a text, is int"),
        ("aime24", {"problem": "1?", "answer": "1000"}, "answer", "must be a whole number from 0 to 999"),
        ("aime24", {"problem": "1?", "answer": "-1"}, "answer", "must be a whole number from 0 to 999"),
        ("aime25", {"problem": " ", "answer": "1"}, "problem", "must not be empty"),
        ("amc23", {"problem": "1?", "answer": True}, "answer", "must be a text or a number, is bool"),
        ("amc23", {"problem": "1?", "answer": float("nan")}, "answer", "must be a finite number"),
        ("minerva", {"problem": "1?", "solution": "it is 1"}, "solution", "must have its answer in \\boxed{}"),
        ("minerva", {"problem": "1?", "solution": "\\boxed{\\frac{1}{2}"}, "solution", "is not closed"),
        ("math500", {"problem": "1?", "answer": None}, "answer", "must be a text or a number"),
        ("custom", {"q": "1?", "a": 1}, "a.b", "is missing"),
        ("custom", {"q": "1?", "a": {"b": 1}, "r": 1.5, "p": ""}, "r", "must be a number from 0 to 1"),
        ("custom", {"q": "1?", "a": {"b": 1}, "r": 1, "p": 3}, "p", "must be a text, is int"),
        ("custom", {"q": None, "a": {"b": 1}, "r": 1, "p": ""}, "q", "must be a text, is NoneType"),
    ],
)
def test_a_damaged_row_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, row: dict[str, Any], field: str, rule: str
) -> None:
    good = {
        "gsm8k": {"question": "2?", "answer": "so\n#### 2"},
        "custom": {"q": "2?", "a": {"b": 1}, "r": 1, "p": ""},
        "minerva": {"problem": "2?", "solution": "\\boxed{2}"},
        "dapo": verl_row("2?", "2"),
    }.get(name, {"problem": "2?", "answer": "2"})
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, row)))
    options = CUSTOM if name == "custom" else ()
    status = command.main([name, "--input", str(path), "--output", str(tmp_path / "out.jsonl"), *options])
    message = capsys.readouterr().err
    assert status == 2
    assert message.startswith(f"error: {path}, row 2, field {field}: ")
    assert rule in message
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("line", "field", "rule"),
    [
        ('{"problem": "\\ud83d?", "answer": "2"}', "(whole row)", "surrogates not allowed"),
        ('{"problem": "1?", "answer": "\\uDC00"}', "(whole row)", "surrogates not allowed"),
        ('{"problem": "1?", "answer": ' + "1" * 5000 + "}", "(whole row)", "must be one JSON object"),
        ('{"problem": "1?", "answer": ' + "[" * 10**5 + "]" * 10**5 + "}", "(whole row)", "must be one JSON object"),
        (json.dumps({"problem": DAPO_BEFORE + " " + DAPO_AFTER, "answer": "2"}), "prompt", "not an instruction alone"),
    ],
    ids=["half a character", "half a character in the answer", "long numeral", "deep nesting", "no question"],
)
def test_rows_that_json_can_hold_and_a_prompt_set_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, field: str, rule: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"problem": "\U0001f600?", "answer": "2"}) + "\n" + line + "\n")
    assert command.main(["math500", "--input", str(path), "--output", str(tmp_path / "out.jsonl")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}, row 2, field {field}: ")
    assert rule in message
    assert not list(tmp_path.glob("out*"))


def test_what_was_dropped_is_listed_for_every_reason(tmp_path: Path) -> None:
    table = [{"question": "Prove it.", "final_answer": None}] * 150
    table += [{"question": f"Find {n}.", "final_answer": [answer]} for n in range(120) for answer in ("1", "2")]
    table += [{"question": "Find it.", "final_answer": ["1"]}]
    _, report = prepare("olympiad", write_rows(tmp_path / "in.jsonl", table), tmp_path / "out.jsonl")
    listed = Counter(entry["reason"] for entry in report["listed"])
    assert listed == dict.fromkeys(report["dropped"], 100)


def test_a_set_of_which_nothing_is_left_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"question": "Prove it.", "final_answer": None}])
    arguments = ["olympiad", "--input", str(path), "--output", str(tmp_path / "out.jsonl")]
    assert command.main(arguments) == 2
    assert "no prompt is left:\n" in (message := capsys.readouterr().err)
    assert "1 dropped: not open-ended" in message
    assert not (tmp_path / "out.jsonl").exists()
    assert command.main([*arguments[:-1], str(tmp_path)]) == 2
    assert "must be the name of a .jsonl file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (27.0, "27"), (-1, "-1"), (0.5, "0.5"), (" 1,\n2 ", "1, 2"), ("$\\frac{600}{7}$", "\\frac{600}{7}"),
        ("$69$,$84$", "$69$,$84$"), ("$(-\\infty, 0) \\cup\\{1\\}$.", "(-\\infty, 0) \\cup\\{1\\}"), ("3.", "3."),
        ("$5", "$5"), (["$1$"], "1"),
    ],
)  # fmt: skip
def test_answers_are_text_without_dollar_signs(value: Any, text: str) -> None:
    assert answers.answer_text(value) == text


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        ("\\boxed{1} then \\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{e^{-t}\n}", "e^{-t}"),
        ("\\boxed{x}\\}", "x"),
    ],
)
def test_the_last_box_holds_the_answer(solution: str, text: str) -> None:
    assert answers.boxed(solution) == text


def test_numbers_of_gsm8k_and_aime() -> None:
    assert answers.after_hashes("so #### 3\n#### 1,234.50 ") == "1234.50"
    assert answers.competition_answer("025") == answers.competition_answer(25) == "25"


@pytest.mark.parametrize("name", [*SETS, "custom", "calculator"])
def test_every_sub_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([name, "--help"])
    assert "--input" in capsys.readouterr().out
