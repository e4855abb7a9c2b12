"""A grader that is not there is named before a process of the run starts."""

import json
import os
import re
from pathlib import Path

import pytest

from minpro_megatron.config.run import with_overrides
from minpro_megatron.launch.preflight.reward_check import reward_problems
from minpro_megatron.launch.preflight.run_checks import problems
from tests.support.reward_service import RewardService
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
        ("maths", "there is no such reward (did you mean math?); known: calculator, dapo, dapo_boxed, http, math, or"),
        ("my_graders:", "there is no such reward; known: "),
        ("my_graders:nope", "it cannot be loaded: AttributeError: module 'my_graders' has no "),
        ("nowhere:grade", "cannot be loaded: ModuleNotFoundError: No module named 'nowhere'; the module must be"),
        ("broken_graders:grade", "cannot be loaded: ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("my_graders:number", "it is not a function but of type int"),
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


FORMS = """
async def patient(group): return [float(one.text == group.answer) for one in group.responses]
def whole(group): return [float(one.text == group.answer) for one in group.responses]
async def none(group): return None
async def fails(group): return [group.metadata["level"]] * len(group.responses)
def short(group): return [1.0]
def three(a, b, c): return 1.0
async def two(a, b): return 1.0
"""


@pytest.mark.parametrize("name", ["patient", "whole"])
def test_the_other_forms_are_called_on_groups(folder: Path, name: str) -> None:
    (folder / "my_forms.py").write_text(FORMS)
    assert found(folder, function=f"my_forms:{name}") == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("none", "TypeError: the grader returned 'None' of type NoneType instead of a list of numbers for the resp"),
        ("fails", "TypeError: 'NoneType' object is not subscriptable for the response '2' and the answer '2' (prompt"),
        ("short", "ValueError: the grader returned 1 rewards for 2 responses for the response '2'"),
        ("three", "its arguments are (a, b, c); a reward is a function (response, answer), or a function or async"),
        ("two", "its arguments are (a, b); a reward is a function (response, answer), or a function or async"),
    ],
)
def test_a_function_of_another_form_is_one_line(folder: Path, name: str, told: str) -> None:
    (folder / "my_forms.py").write_text(FORMS)
    (line,) = found(folder, function=f"my_forms:{name}")
    assert line.startswith(f"reward.function = 'my_forms:{name}': {told}")


def test_every_service_is_asked(folder: Path) -> None:
    with RewardService().running() as service, RewardService(share=1, faults=["internal_error"]).running() as broken:
        assert found(folder, function="http", urls=[service.url]) == []
        lines = found(folder, by_source={"test": "http"}, urls=[service.url, broken.url, "http://127.0.0.1:9/"])
    assert len(lines) == 2
    assert lines[0].startswith(
        f"reward.urls: {broken.url}: status 500: 'the judge is out of memory' (for prompt '1' of "
    )
    assert lines[1].startswith("reward.urls: http://127.0.0.1:9/: ClientConnectorError: ")
    assert all(line.endswith("; start the service, or correct the address or its answer") for line in lines)


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ({"function": "http"}, "reward: urls = []: function or by_source says http; give a service"),
        ({"by_source": {"s": "http"}}, "reward: urls = []: function or by_source says http; give a service"),
        ({"function": "http", "urls": ["localhost:80"]}, "urls: 'localhost:80' is not the address of a service"),
    ],
)
def test_the_services_are_given_with_http(folder: Path, reward: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        with_overrides(example_config(folder), [f"reward={json.dumps(reward)}"])
