"""Forms that data sets of the field come in: files, schemas, instructions and wrappings of answers."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from minpro_megatron.commands import prepare as command
from minpro_megatron.config.instructions import DAPO_AFTER, DAPO_BEFORE
from minpro_megatron.prompt_sets.answers import ListRule, answer_text, boxed
from minpro_megatron.prompt_sets.instructions import MIN_SHARING_PROMPTS, without_instructions
from minpro_megatron.rewards import dapo, mathematics
from tests.support.rollout_fakes import write_rows

CUSTOM = ("--prompt-column", "question", "--answer-column", "answer")
STEP_BY_STEP = "Let's think step by step and output the final answer"


def prepare(name: str, source: Path, *options: str) -> list[tuple[str, str]]:
    """(question, answer) of each prompt."""
    output = source.with_name("out.jsonl")
    assert command.main([name, "--input", str(source), "--output", str(output), *options]) == 0
    return [(row["prompt"], row["answer"]) for row in map(json.loads, output.read_text().splitlines())]


def refusal(capsys: pytest.CaptureFixture[str], name: str, source: Path, *options: str) -> str:
    """The one line with which the command ends."""
    output = source.with_name("out.jsonl")
    assert command.main([name, "--input", str(source), "--output", str(output), *options]) == 2
    assert not output.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("solution", "text"),
    [
        ("It is $\\boxed 2$.", "2"), ("It is \\boxed 25.", "25"), ("It is \\fbox{4}.", "4"), ("So \\boxed {5}", "5"),
        ("So $x = \\framebox{6}$", "6"), ("So $\\boxed\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("\\boxed{\\frac 12}", "\\frac 12"),
        ("first \\boxed{1}, then $\\boxed 3$", "3"), ("$\\boxed{\\text{(A)}}$", "\\text{(A)}"),
        ("So \\boxed{\\boxed{7}}", "7"),
    ],
)  # fmt: skip
def test_the_box_of_a_solution_may_have_no_braces(solution: str, text: str, tmp_path: Path) -> None:
    assert boxed(solution) == text
    path = write_rows(tmp_path / "in.jsonl", [{"problem": "Which?", "solution": solution}])
    assert prepare("math500", path) == [("Which?", text)]


@pytest.mark.parametrize(
    ("solution", "rule"),
    [
        ("It is 2.", "must have its answer in \\boxed{}"),
        ("It is \\boxed{2", "is not closed"),
        ("\\fbox{\\frac{1}{2}", "is not closed"),
        ("\\boxed{}", "not empty"),
        (5, "must have its answer in \\boxed{}"),
    ],
)
def test_a_solution_without_an_answer_is_refused(solution: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule.replace("\\", "\\\\").replace("{", "\\{")):
        boxed(solution)


def chat(text: str, *before: dict[str, str]) -> list[dict[str, str]]:
    return [*before, {"role": "user", "content": text}]


VERL_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("gsm8k", {"prompt": chat(f'1+1? {STEP_BY_STEP} after "####".')}),
    ("math500", {"prompt": chat(f"1+1? {STEP_BY_STEP} within \\boxed{{}}.")}),
    ("minerva", {"prompt": chat("1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.")}),
    ("olympiad", {"prompt": chat("1+1?\n\nPresent the answer in LaTex format: \\boxed{Your answer}")}),
    ("aime24", {"prompt": chat(f"{DAPO_BEFORE}1+1?{DAPO_AFTER}")}),
    ("amc23", {"prompt": chat("1+1?", {"role": "system", "content": f"{STEP_BY_STEP} within \\boxed{{}}."})}),
    ("dapo", {"prompt": chat(f"{DAPO_BEFORE.strip()} \n1+1?\n{DAPO_AFTER} \n")}),
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "chat as text"])
@pytest.mark.parametrize(("name", "row"), VERL_ROWS)
def test_every_set_is_read_in_verls_schema(name: str, row: dict[str, Any], kind: str, tmp_path: Path) -> None:
    row = row | {"data_source": "x", "reward_model": {"style": "rule", "ground_truth": "2"}}
    if kind == "parquet":
        path = tmp_path / "in.parquet"
        parquet.write_table(pa.Table.from_pylist([row | {"extra_info": {"index": 0, "split": "train"}}]), path)
    else:
        row["prompt"] = json.dumps(row["prompt"]) if kind == "chat as text" else row["prompt"]
        path = write_rows(tmp_path / "in.jsonl", [row])
    assert prepare(name, path) == [("1+1?", "2")]
    by_columns = prepare("custom", path, "--prompt-column", "prompt", "--answer-column", "reward_model.ground_truth")
    assert by_columns == [("1+1?", "2")]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("dapo", {"prompt": chat(f"{DAPO_BEFORE}1+1?{DAPO_AFTER}"), "label": "2"}),
        ("dapo", {"prompt": f"{DAPO_BEFORE}1+1?{DAPO_AFTER}", "label": 2}),
        ("gsm8k", {"prompt": chat("1+1?"), "label": "1+1=<<1+1=2>>2\n#### 2", "metadata": {}}),
        ("gsm8k", {"question": "1+1?", "label": "2"}),
        ("math500", {"prompt": chat("1+1?"), "label": "\\boxed{2}"}),
        ("aime25", {"prompt": chat("1+1?"), "label": "002"}),
        ("amc23", {"prompt": chat("1+1?"), "label": 2.0, "reward_model": None}),
    ],
)
def test_every_set_is_read_in_slimes_schema(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    assert prepare(name, write_rows(tmp_path / "in.jsonl", [row])) == [("1+1?", "2")]


def test_a_chat_without_an_answer_names_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": chat(f"{DAPO_BEFORE}1+1?{DAPO_AFTER}"), "target": "2", "reward_model": {"style": "rule"}}
    message = refusal(capsys, "dapo", write_rows(tmp_path / "in.jsonl", [row]))
    assert "reward_model.ground_truth (verl's schema) or label (slime's)" in message
    assert "there is prompt, target, reward_model.style. Name another one with: minpro prepare custom" in message


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_wrong_column_names_all_that_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    row = {"q": "1+1?", "solution": "so 2", "label": "2", "level": 5, "topic": "sums"}
    path = tmp_path / f"in.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist([row]), path)
    elif kind == "jsonl":
        write_rows(path, [row])
    else:
        path.write_text(f"{','.join(row)}\n{','.join(map(str, row.values()))}\n")
    for prompt, answer, field in (("question", "label", "question"), ("q", "answer", "answer"), ("q", "q.a", "q.a")):
        message = refusal(capsys, "custom", path, "--prompt-column", prompt, "--answer-column", answer)
        assert message.endswith(f"row 1, field {field}: is missing; there is q, solution, label, level, topic")


ROWS = [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "question,answer\n1+1?,2\n2+2?,4\n"
FORMS: dict[str, bytes] = {
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "bom.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "crlf.csv": CSV.replace("\n", "\r\n").encode(),
    "blank.jsonl": LINES.replace("\n", "\n\n \r\n").encode(),
    "blank.csv": CSV.replace("\n", "\n\n").encode(),
    "first_line_blank.jsonl": b"\n" + LINES.encode(),
    "no_newline.jsonl": LINES.strip().encode(),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "array_on_a_line.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode() + b"\n",
    "array.jsonl": json.dumps(ROWS).encode(),
    "lines.json": LINES.encode(),
    "lines.txt": LINES.encode(),
    "quoted.csv": b'note,question,answer\n"a\nb",1+1?,2\n"x, y",2+2?,"4"\n',
    "table.tsv": CSV.replace(",", "\t").encode(),
    "rows.jsonl.gz": gzip.compress(LINES.encode(), mtime=0),
    "rows.csv.gz": gzip.compress(CSV.encode(), mtime=0),
    "array.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "rows.jsonl.xz": lzma.compress(LINES.encode()),
    "without_its_suffix": gzip.compress(b"\xef\xbb\xbf" + LINES.encode(), mtime=0),
}


@pytest.mark.parametrize("name", FORMS)
def test_text_files_are_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FORMS[name])
    assert sorted(prepare("custom", path, *CUSTOM)) == [("1+1?", "2"), ("2+2?", "4")]


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "in.parquet", "git lfs pull"),
        (b"\x28\xb5\x2f\xfd\x00", "in.jsonl.zst", "zstd -d {path}"),
        (b"PK\x03\x04\x00", "in.xlsx", "unpack it, or save the sheet as CSV"),
        (LINES.encode("utf-16"), "in.jsonl", "iconv -f UTF-16 -t UTF-8 {path}"),
        (CSV.encode("utf-16"), "in.csv", "iconv -f UTF-16 -t UTF-8 {path}"),
        (b"<!DOCTYPE html>\n<html>", "in.jsonl", "a web page instead of the file"),
        (b"ARROW1\x00\x00", "in.feather", "an Arrow file; write it as parquet"),
        (b"\x80\x04\x95\x00", "in.pkl", "a Python pickle"),
        (gzip.compress(LINES.encode() * 100, mtime=0)[:-20], "in.jsonl.gz", "cannot be decompressed"),
        (b"BZh9" + b"0" * 99, "in.jsonl.bz2", "cannot be decompressed"),
        (lzma.compress(LINES.encode())[:-9], "in.jsonl.xz", "cannot be decompressed"),
        (gzip.compress(b"PAR1", mtime=0), "in.parquet.gz", "is a compressed parquet file; decompress it"),
        (json.dumps({"data": ROWS}, indent=1).encode(), "in.json", "is one JSON object with 'data', not one object"),
        (b'[{"question": "1+1?", "answer": "2"}, 5]', "in.json", "row 2, field (whole row): must be one JSON object"),
        (b'[{"question": "1+1?",\n "answer": }]', "in.json", "{path}, line 2: must be a JSON array of objects"),
        (b"[" * 10**5, "in.json", "must be a JSON array of objects"),
        (b'[{"question": "\\ud83d?", "answer": "2"}]', "in.json", "row 1, field (whole row): must be UTF-8"),
        (b"question,answer\n1+1?,2,3\n", "in.csv", "row 1, field (whole row): has 3 values, the header has 2 columns"),
        (b"question,question\n1+1?,2\n", "in.csv", "two columns have the same name"),
        (b'question,answer\n"1+1?,2\n', "in.csv", "must be CSV"),
        (b"question,answer\n\xff,2\n", "in.csv", "must be UTF-8"),
        (b"question,answer\n1+1?,\n", "in.csv", "row 1, field answer: must be a text or a number and not empty"),
        (b"question;answer\n1+1?;2\n", "in.csv", "field question: is missing; there is question;answer"),
    ],
)  # fmt: skip
def test_other_files_are_named_with_what_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, name: str, problem: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(capsys, "custom", path, *CUSTOM)
    assert message.startswith(f"error: {path}")
    assert problem.format(path=path) in message


def test_a_folder_of_csv_files_beside_its_description(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "dataset_infos.json").write_text("{}")
    (folder / "train-00000-of-00002.csv").write_text("question,answer\n1+1?,2\n")
    (folder / "train-00001-of-00002.csv").write_text("question,answer\n2+2?,4\n")
    assert sorted(prepare("custom", folder, *CUSTOM)) == [("1+1?", "2"), ("2+2?", "4")]
    (tmp_path / "out.jsonl").unlink()
    missing = refusal(capsys, "custom", tmp_path / "none.csv", *CUSTOM)
    assert missing.endswith("none.csv: no such file; give a file, a folder or a hub id such as owner/name")


def float32(*values: float) -> pa.Array:
    return pa.array(values, pa.float32())


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (float32(0.1, 34), ["0.1", "34"]),
        (pa.array([0.5, -0.0], pa.float16()), ["0.5", "0"]),
        (pa.array([0.1, 1e23]), ["0.1", "100000000000000000000000"]),
        (pa.array([Decimal("0.10"), Decimal("34.00")]), ["0.10", "34"]),
        (pa.array([2**63 + 5, 2**53 + 1], pa.uint64()), ["9223372036854775813", "9007199254740993"]),
        (pa.array(["1", "2"]).dictionary_encode(), ["1", "2"]),
        (pa.array([[0.1], [2.5]], pa.list_(pa.float32())), ["0.1", "2.5"]),
        (pa.array([b"1", b"\xc2\xbd"]), ["1", "½"]),
        (pa.array([["1"], ["2"]], pa.large_list(pa.large_string())), ["1", "2"]),
    ],
)
def test_columns_of_every_type_keep_their_values(tmp_path: Path, column: pa.Array, texts: list[str]) -> None:
    path = tmp_path / "in.parquet"
    nested = pa.StructArray.from_arrays([column], ["b"])
    parquet.write_table(pa.table({"question": ["a?", "b?"], "answer": column, "inside": nested}), path)
    assert sorted(prepare("custom", path, *CUSTOM)) == list(zip(("a?", "b?"), texts, strict=True))
    inside = prepare("custom", path, "--prompt-column", "question", "--answer-column", "inside.b")
    assert sorted(inside) == list(zip(("a?", "b?"), texts, strict=True))


# The value in the file, the answer as written, and a right response.
WRAPPED: list[tuple[Any, str, str]] = [
    ('["34"]', "34", "34"), ("['34']", "34", "34"), ("[34]", "34", "34"), (["34"], "34", "34"), ([["34"]], "34", "34"),
    ('["\\\\frac{1}{2}", "0.5"]', "\\frac{1}{2}", "0.5"), ('["\\frac{1}{2}"]', "\\frac{1}{2}", "1/2"),
    ('["\\pi", "\\pi"]', "\\pi", "\\pi"), ('["\\text{A}"]', "\\text{A}", "A"),
    ("['\\\\sqrt{2}']", "\\sqrt{2}", "\\sqrt{2}"),
    ('"34"', "34", "34"),
    ("\\boxed{2, -2}", "2, -2", "-2, 2"), ("\\boxed{1,080}", "1,080", "1080"), ("$\\boxed{x=3}$.", "x=3", "3"),
    ("\\boxed{5 \\text{ cm}}", "5 \\text{ cm}", "5"), ("\\fbox{7}", "7", "7"), ("\\boxed 7", "7", "7"),
    ("The sum is $\\boxed{7}$.", "7", "7"), ("\\boxed{1} and \\boxed{2}", "1, 2", "2, 1"),
    ("\\boxed{\\boxed{7}}", "7", "7"),
    ("#### 7", "7", "7"), ("####7", "7", "7"), ("3+4=<<3+4=7>>7\n#### 7", "7", "7"), ("#### 1,080", "1,080", "1080"),
    ("#### $\\frac{1}{2}$", "\\frac{1}{2}", "0.5"), ("Answer: 7", "7", "7"), ("So.\n**Final Answer:** $7$", "7", "7"),
    ("<answer> 7 </answer>", "7", "7"), ("<answer>\\boxed{7}</answer>", "7", "7"),
    ("$7$", "7", "7"), ("$$\\frac{1}{2}$$", "\\frac{1}{2}", "1/2"), ("\\(7\\)", "7", "7"),
    ("\\[ x^2 \\].", "x^2", "x^2"),
    ("$\\$7$", "\\$7", "7"),
    (7, "7", "7"), (7.0, "7", "7"), (-0.25, "-0.25", "-1/4"), (1e-7, "1e-07", "0.0000001"),
    (Decimal("7.50"), "7.50", "7.5"),
    ([7.0], "7", "7"),
]  # fmt: skip
UNWRAPPED = [
    "[1, 2]", "[1,2)", "(1, 2)", "$69$,$84$", "$5", "\\(1\\), \\(2\\)", "3.", "5 \\text{ cm}", "\\{1, 2\\}",
    "x = [0, 1]", "\\text{the answer}", "f(x) = \\$3", "[a, b]", "[x]",
]  # fmt: skip


@pytest.mark.parametrize(("value", "text", "response"), WRAPPED)
def test_answers_are_taken_out_of_their_wrapping(value: Any, text: str, response: str) -> None:
    assert answer_text(value) == text
    assert mathematics.grade(f"Answer: {response}", text).reward == 1.0


@pytest.mark.parametrize("text", UNWRAPPED)
def test_answers_that_only_look_wrapped_stay_as_they_are(text: str) -> None:
    assert answer_text(text) == text


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("\\boxed{7", "a box that is empty or not closed"),
        ("\\boxed{}", "not empty|a box that is empty"),
        ("3+4\n####", "must end with a line '#### <answer>'"),
        ("#### Step 1\nWe add.", "must end with a line '#### <answer>'"),
        ("[]", "not empty"),
        ([], "not empty"),
        ('["34", ""]', "not empty"),
        ('["34"', "looks like a list|not empty"),
        ("['34]", "looks like a list of texts"),
        ('["a", null]', "is NoneType"),
        ({"value": "7"}, "an object with value"),
        ('{"value": "7"}', "a JSON object with the fields value"),
        (["1", "2"], "--answer-list all .* --answer-list any"),
        ('["1", "2"]', "holds 2 answers .'1', '2'."),
        (b"\xff", "must be a text or a number"),
        (float("inf"), "must be a finite number"),
        (Decimal("NaN"), "must be a finite number"),
    ],
)
def test_a_wrapping_without_one_answer_is_refused(value: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        answer_text(value)


@pytest.mark.parametrize(
    ("value", "rule", "right", "wrong"),
    [
        (["1", "2"], "all", ["1, 2", "2 and 1"], ["1", "2"]),
        ('["1", "2"]', "all", ["2, 1"], ["1"]),
        ('["1", "2"]', "any", ["1", "2", "2.0"], ["1, 2", "3"]),
        (["\\frac{1}{2}", "$\\pi$"], "any", ["1/2", "\\pi"], ["0", "\\frac{1}{2}, \\pi"]),
        ([7, 7.0, "7"], "any", ["7"], ["8"]),
        (["(1,2)", "(3,4)"], "all", ["(3,4), (1,2)"], ["(1,2)"]),
    ],
)
def test_all_or_any_of_a_list(value: Any, rule: ListRule, right: list[str], wrong: list[str]) -> None:
    answer = answer_text(value, rule)
    assert [mathematics.grade(f"Answer: {text}", answer).reward for text in right] == [1.0] * len(right)
    assert [mathematics.grade(f"Answer: {text}", answer).reward for text in wrong] == [0.0] * len(wrong)


def test_dapos_graders_know_alternatives() -> None:
    answer = answer_text(["1/2", "0.5"], "any")
    assert [dapo.grade(f"Answer: {text}", answer).reward for text in ("1/2", "0.5", "1")] == [1.0, 1.0, -1.0]
    assert [dapo.grade_boxed(f"\\boxed{{{text}}}", answer).reward for text in ("0.5", "5")] == [1.0, -1.0]


def test_the_convention_of_lists_is_an_option(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.jsonl", [{"question": "Solve.", "answer": ["1", "2"], "final_answer": ["1", "2"]}])
    assert prepare("custom", path, *CUSTOM, "--answer-list", "all") == [("Solve.", "1, 2")]
    assert prepare("custom", path, *CUSTOM, "--answer-list", "any") == [("Solve.", '["1", "2"]')]
    assert prepare("olympiad", path) == [("Solve.", "1, 2")]
    assert prepare("olympiad", path, "--answer-list", "any") == [("Solve.", '["1", "2"]')]


def raises(response: str, answer: str) -> float:
    raise KeyError(answer)


@pytest.mark.parametrize(
    ("reward", "answers", "refused"),
    [
        ("math", ["2", "\\frac{1}{2}", "yes", "1, 2"], []),
        ("math", ["2", "x" * 1001, "."], [2, 3]),
        ("dapo", ["2", "1/2", "x" * 400], [3]),
        ("dapo_boxed", ["2", "x" * 120], [2]),
        ("calculator", ["2", "2.5", "024"], [2, 3]),
        (f"{__name__}:raises", ["2"], [1]),
    ],
)
def test_answers_that_the_grader_does_not_accept_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reward: str, answers: list[str], refused: list[int]
) -> None:
    rows = [{"question": f"{place}?", "answer": answer} for place, answer in enumerate(answers)]
    assert len(prepare("custom", write_rows(tmp_path / "in.jsonl", rows), *CUSTOM, "--reward", reward)) == len(rows)
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert (report["reward"], report["answers_not_accepted"]) == (reward, len(refused))
    assert [(found["file"], found["row"]) for found in report["not_accepted"]] == [("in.jsonl", row) for row in refused]
    account = capsys.readouterr().out
    assert (f"{len(refused)} answers that the reward {reward} does not accept" in account) == bool(refused)
    assert all(f"in.jsonl, row {row}: " in account for row in refused)


def test_an_unknown_grader_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "in.jsonl", ROWS)
    assert "there is no such reward (did you mean math?); known: calculator" in refusal(
        capsys, "custom", path, *CUSTOM, "--reward", "maths"
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: f'{text} {STEP_BY_STEP} after "####".',
        lambda text: f"{text}\n\n{STEP_BY_STEP}\nwithin \\boxed{{}}. ",
        lambda text: f"Please reason step by step, and put your final answer within \\boxed{{}}.\n{text}",
        lambda text: f"{DAPO_BEFORE}{text}{DAPO_AFTER}\n",
        lambda text: f"{DAPO_BEFORE}{text} {STEP_BY_STEP} within \\boxed{{}}.{DAPO_AFTER}",
        lambda text: f"  {text}\n",
    ],
)
def test_known_instructions_are_taken_off(wrap: Callable[[str], str]) -> None:
    question = "What does “Let's think step by step” mean in\n\n$\\boxed{}$?"
    assert without_instructions(wrap(question)) == question


def test_an_unknown_instruction_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ending = "Write the result as <result>...</result> and nothing else."
    rows = [{"question": f"{n}+{n}? {ending}", "answer": 2 * n} for n in range(MIN_SHARING_PROMPTS)]
    prepare("custom", write_rows(tmp_path / "in.jsonl", rows), *CUSTOM)
    assert f"every prompt has '{ending}': if it is an instruction" in capsys.readouterr().out
    rows = [{"question": f"What is the sum of {n} and {n}?", "answer": 2 * n} for n in range(MIN_SHARING_PROMPTS - 1)]
    prepare("custom", write_rows(tmp_path / "in.jsonl", rows), *CUSTOM)
    assert "every prompt has" not in capsys.readouterr().out


def test_pass_rates_of_csv_and_decimals(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text("question,answer,rate\n1+1?,2,0.25\n2+2?,4,1\n3+3?,6,\n")
    prepare("custom", path, *CUSTOM, "--pass-rate-column", "rate")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["prompt"]: row.get("pass_rate") for row in rows} == {"1+1?": 0.25, "2+2?": 1.0, "3+3?": None}
