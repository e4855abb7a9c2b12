"""The calculator prompt set: what is shipped, how it is made, and what happens to damaged input."""

import json
import random
from pathlib import Path

import pytest

from minpro_megatron.commands import prepare as command
from minpro_megatron.prompt_sets import calculator, rows
from minpro_megatron.rewards import calculator as task

REPOSITORY = Path(__file__).resolve().parents[3]
SHIPPED = REPOSITORY / "recipes" / "data"
GSM8K_TRAIN = REPOSITORY.parent / "shared" / "data" / "gsm8k_train.jsonl"
FILES = (calculator.TRAIN_FILE, calculator.HELDOUT_FILE)


def shipped(name: str) -> list[dict[str, str]]:
    return [row for _, row in rows.read_jsonl(SHIPPED / name)]


def write_gsm8k(path: Path, solutions: list[str]) -> Path:
    lines = [json.dumps({"question": "How many?", "answer": f"{text}\n#### 1"}) for text in solutions]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_shipped_sets_are_large_enough_and_disjoint() -> None:
    train, heldout = ({row["prompt"] for row in shipped(name)} for name in FILES)
    assert len(train) >= 350
    assert len(heldout) >= 128
    assert not train & heldout


@pytest.mark.parametrize("name", FILES)
def test_every_shipped_row_is_right(name: str) -> None:
    table = shipped(name)
    assert [row["id"] for row in table] == sorted(row["id"] for row in table)
    answers = dict(task.all_expressions())
    for row in table:
        expression = row["prompt"].removesuffix("=")
        assert row == calculator.prompt_row(expression, row["answer"])
        # eval is an arithmetic that shares no code with the task's; the text is digits and one operator.
        assert eval(expression) == int(row["answer"]), row
        assert answers[row["prompt"]] == row["answer"]
        assert task.grade(row["answer"], row["answer"]) == 1.0


def test_shipped_files_are_what_the_tool_makes(tmp_path: Path) -> None:
    if not GSM8K_TRAIN.exists():
        pytest.skip(f"needs GSM8K's training file at {GSM8K_TRAIN}")
    calculator.prepare(GSM8K_TRAIN, tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_each_annotation_is_counted_once_under_its_reason(tmp_path: Path) -> None:
    path = write_gsm8k(
        tmp_path / "gsm8k.jsonl",
        [
            "<<4+5=9>> and again <<4+5=9>>",
            "<<4+5=8>> is wrong, and so is <<7/2=3>> and <<3-5=2>>",
            "<<0.5*4=2>> <<1+2+3=6>> <<05+1=6>> <<9=9>> <<4+5>>",
            "<<400+500=900>> <<3-5=-2>>",
            "<<8/2=4>>",
        ],
    )
    extraction = calculator.extract(path)
    assert extraction.answers == {"4+5": "9", "8/2": "4"}
    assert extraction.counts == {
        "kept": 2,
        "dropped: seen before": 1,
        "dropped: the stated result is wrong": 3,
        "dropped: not one operation on two whole numbers": 5,
        "dropped: outside the limits of the task": 2,
    }


def test_the_split_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    expressions = [f"<<{prompt}{answer}>>" for prompt, answer in task.all_expressions()]
    for folder in ("a", "b"):
        random.Random(folder).shuffle(expressions)
        calculator.prepare(write_gsm8k(tmp_path / f"{folder}.jsonl", expressions), tmp_path / folder)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    written = sum(len((tmp_path / "a" / name).read_text().splitlines()) for name in FILES)
    assert written == len(expressions)


GOOD_ROW = b'{"question": "q", "answer": "<<1+1=2>>2\\n#### 2"}'


@pytest.mark.parametrize(
    ("damaged", "field", "rule"),
    [
        (b'{"question": "q"}', "answer", "is missing"),
        (b'{"question": "q", "answer": 2}', "answer", "must be a text, is int"),
        (b'{"question": "q", "answer": " "}', "answer", "must not be empty"),
        (b'{"question": "q", "answer": "<<1+1=2>>2"}', "answer", "cut off"),
        (b'{"question": "q", "answer": "<<1+1', "(whole row)", "one JSON object"),
        (b'["q"]', "(whole row)", "is list"),
        (b"#", "(whole row)", "one JSON object"),
        (b"\xff\xfe", "(whole row)", "UTF-8"),
    ],
)
def test_a_damaged_row_is_named(
    damaged: bytes, field: str, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_bytes(b"\n".join([GOOD_ROW, GOOD_ROW, damaged, GOOD_ROW]) + b"\n")
    output = tmp_path / "prompts"
    code = command.main(["calculator", "--input", str(path), "--output", str(output)])
    message = capsys.readouterr().err
    assert code == 2
    assert f"{path}, row 3, field {field}: " in message
    assert rule in message
    assert not output.exists()


def test_the_command_prints_the_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gsm8k(tmp_path / "gsm8k.jsonl", ["<<4+5=9>> <<4+5=9>>"])
    assert command.main(["calculator", "--input", str(path), "--output", str(tmp_path)]) == 0
    account = capsys.readouterr().out
    assert "2 annotations" in account
    assert "1 kept" in account
    assert "1 dropped: seen before" in account


def test_a_missing_input_is_an_error_not_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.jsonl"
    assert command.main(["calculator", "--input", str(missing), "--output", str(tmp_path)]) == 2
    assert str(missing) in capsys.readouterr().err
