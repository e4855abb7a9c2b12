"""tools/grade.py: rows in, graded rows out, by the reward of their source; bad rows told by file, line and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.commands.grade import FIELDS, main, printed, read_rows
from minpro_megatron.rewards.judging import Judged

ROW = {"data_source": "calculator", "ground_truth": "24", "response": "24"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def grade(capsys: pytest.CaptureFixture[str], path: Path, *options: str) -> tuple[int, list[dict[str, Any]], str]:
    status = main(["--input", str(path), "--workers", "1", *options])
    captured = capsys.readouterr()
    return status, [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_rows_are_graded_by_their_source_and_printed_in_order(tmp_path: Path, capsys) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        ROW | {"id": 7},
        {"data_source": "math_dapo", "ground_truth": "25", "response": "Answer: 025"},
        "",
        {"data_source": "aime24", "ground_truth": "025", "response": "\x1b[2J\nAnswer: $25$"},
        {"data_source": "minerva_math", "ground_truth": "0.5", "response": "none"},
        ROW | {"ground_truth": "twenty-four"},
    )
    status, rows, errors = grade(capsys, path)
    assert status == 0
    assert [(row["reward"], row["extracted"]) for row in rows] == [
        (1.0, None), (-1.0, "025"), (1.0, "$25$"), (0.0, None), (None, None),
    ]  # fmt: skip
    assert rows[0]["id"] == 7
    assert all(row["seconds"] >= 0 for row in rows[:4])
    assert "ValueError: answer: 'twenty-four'" in rows[4]["problem"]
    assert "5 rows: 1 with reward -1.0, 1 with reward 0.0, 2 with reward 1.0; mean 0.25" in errors
    assert "not graded: grader failed for 1, exceeded its time for 0" in errors


def test_one_reward_for_all_rows_and_a_summary_for_programs(tmp_path: Path, capsys) -> None:
    path = write(tmp_path / "rows.jsonl", ROW, {"ground_truth": "24", "response": "24"})
    status, rows, errors = grade(capsys, path, "--reward", "tests.support.hostile_rewards:three", "--json")
    assert (status, [row["reward"] for row in rows]) == (0, [3.0, 3.0])
    assert "data_source" not in rows[1]
    summary = json.loads(errors)
    assert (summary["rows"], summary["mean_reward"], summary["failed"], summary["rewards"]) == (2, 3.0, 0, {"3.0": 2})


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("nonsense", "known: calculator, dapo, dapo_boxed, http, math, or the import path"),
        ("http", "--reward http: give the address of a service with --url"),
        ("no_such_package.module:grade", "No module named 'no_such_package'"),
        ("tests.support.hostile_rewards:missing", "has no attribute 'missing'"),
        ("tests.support.hostile_rewards:NUMBER", "not a function but of type int"),
    ],
)
def test_a_reward_that_cannot_be_used_is_reported(tmp_path: Path, capsys, reward: str, message: str) -> None:
    status, rows, errors = grade(capsys, write(tmp_path / "rows.jsonl", ROW), "--reward", reward)
    assert (status, rows) == (2, [])
    assert message in errors
    assert reward in errors


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *(({name: ROW[name] for name in FIELDS if name != field}, f"{field} is missing") for field in FIELDS),
        (ROW | {"response": None}, "response must be a text, not null"),
        (ROW | {"ground_truth": 27.0}, "ground_truth must be a text, not 27.0"),
        (ROW | {"response": "\ud800"}, "response has half of a surrogate pair"),
        ("[1]", "a row must be a JSON object"),
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_bad_rows_are_reported_before_anything_is_graded(tmp_path: Path, capsys, row: Any, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", ROW, row)
    status, rows, errors = grade(capsys, path)
    assert (status, rows) == (2, [])
    assert f"{path}, line 2: " in errors
    assert message in errors


def test_every_bad_row_is_reported_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\n" + b"{}\n" * 30)
    with pytest.raises(ValueError, match=r"line 1: .*utf-8") as error:
        read_rows(path)
    assert str(error.value).splitlines()[-1] == "and 11 more"
    assert len(str(error.value).splitlines()) == 21


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, capsys, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    status, _, errors = grade(capsys, tmp_path / "rows.jsonl")
    assert (status, "it has no rows" in errors) == (2, True)
    assert grade(capsys, tmp_path / "missing.jsonl")[0] == 2


def test_only_printable_ascii_is_printed() -> None:
    hostile = "\x1b[2J\x07\x7f\x85\u202e\n"
    line = printed(ROW | {"response": hostile, hostile: 1}, Judged(0.0, extracted=hostile, seconds=0.0))
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["extracted"] == hostile
