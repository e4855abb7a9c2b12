"""A grader that is not there is named before a process of the run starts."""

import os
from pathlib import Path

import pytest

from minpro_megatron.launch.preflight.reward_check import reward_problems
from minpro_megatron.launch.preflight.run_checks import problems
from tests.support.rollout_fakes import write_rows
from tests.support.run_examples import example_config, write_example_files

GRADERS = """
import sys
print("a grader that talks at import")
number = 3
def grade(text, answer): return float(text == answer)
def raises(text, answer): return {"2": 1.0}[text]
def nothing(text, answer): pass
def says(text, answer): return "1.0"
def undefined(text, answer): return float("nan")
def hangs(text, answer):
    while True: pass
def ends(text, answer): sys.exit(0) if False else __import__("os")._exit(5)
def strict(text, answer): return float(int(answer) == 2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the run is started: with modules of the user's."""
    write_example_files(tmp_path)
    (tmp_path / "my_graders.py").write_text(GRADERS)
    (tmp_path / "broken_graders.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "fatal_graders.py").write_text("import os\nos.write(2, b'no licence\\n')\nos._exit(9)\n")
    monkeypatch.setenv("PYTHONPATH", f"{os.getcwd()}:{tmp_path}")
    return tmp_path


def found(folder: Path, **reward: object) -> list[str]:
    return list(reward_problems(example_config(folder, reward=reward)))


@pytest.mark.parametrize("name", ["calculator", "dapo", "dapo_boxed", "math", "my_graders:grade"])
def test_what_can_grade_is_no_problem(folder: Path, name: str) -> None:
    assert found(folder, function="dapo", by_source={"test": name}) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("maths", "there is no such reward (did you mean math?); known: calculator, dapo, dapo_boxed, math, or"),
        ("my_graders:", "there is no such reward; known: "),
        ("my_graders:nope", "reward 'my_graders:nope' cannot be loaded: AttributeError: module 'my_graders' has no "),
        ("nowhere:grade", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'; the module must be"),
        ("broken_graders:grade", "cannot be loaded: ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("my_graders:number", "is not a function but of type int; give one of (response text, answer)"),
        (
            "fatal_graders:grade",
            "its import ended the grading process with exit code 9 (no licence); correct the module",
        ),
    ],
)
def test_what_cannot_is_one_line_with_its_setting(folder: Path, name: str, told: str) -> None:
    (line,) = found(folder, function=name)
    assert line.startswith(f"reward.function = {name!r}: ")
    assert told in line


def test_every_setting_has_its_line(folder: Path) -> None:
    lines = found(folder, function="nowhere:grade", by_source={"a": "mth", "b": "dapo", "c": "nowhere:grade"})
    assert [line.split(": ")[0] for line in lines] == [
        "reward.function = 'nowhere:grade'",
        "reward.by_source['a'] = 'mth'",
        "reward.by_source['c'] = 'nowhere:grade'",
    ]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("raises", "KeyError: 'Answer: 2' for the response 'Answer: 2' and the answer '2'"),
        ("nothing", "TypeError: the grader returned 'None' of type NoneType instead of a number for the response '2'"),
        ("says", "TypeError: the grader returned '1.0' of type str instead of a number for the response '2'"),
        ("undefined", "ValueError: the grader returned nan, which is not a finite number for the response '2'"),
        (
            "hangs",
            "it exceeded reward.timeout_s = 0.3 s of processor time, or 10 times as much wall time for ",
        ),
        ("ends", "it ended the process with exit code 5 for the response '2'"),
    ],
)
def test_a_grader_is_called_on_rows_of_the_run(folder: Path, name: str, told: str) -> None:
    (line,) = found(folder, function=f"my_graders:{name}", timeout_s=0.3)
    assert line.startswith(f"reward.function = 'my_graders:{name}': {told}")
    assert line.endswith("(prompt '1' of data.train_file); correct the grader, or the row")


def test_rows_of_every_file_are_tried_with_the_grader_of_their_source(folder: Path) -> None:
    rows = [{"id": str(number), "source": "s", "prompt": f"{number}", "answer": "2"} for number in range(40)]
    bad = {"id": "bad", "source": "other", "prompt": "?", "answer": "two"}
    for name, content in (("train", rows), ("heldout", rows[:1]), ("bench", [*rows, bad])):
        write_rows(folder / f"{name}.jsonl", content)
    benchmarks = [{"name": "bench", "file": str(folder / "bench.jsonl")}]
    config = example_config(
        folder,
        reward={"function": "my_graders:grade", "by_source": {"other": "my_graders:strict"}},
        evaluation={"num_prompts": 1, "benchmarks": benchmarks},
    )
    (line,) = reward_problems(config)
    assert line.startswith("reward.by_source['other'] = 'my_graders:strict': ValueError: invalid literal")
    assert "the answer 'two' (prompt 'bad' of evaluation.benchmarks)" in line


def test_preflight_asks(folder: Path) -> None:
    (problem,) = problems(example_config(folder, reward={"function": "maths"}))
    assert problem.startswith("reward.function = 'maths': there is no such reward")
