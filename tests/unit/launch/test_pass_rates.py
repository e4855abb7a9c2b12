"""The command `pass-rates` around its sampling: what it writes, what it refuses, and that it samples nothing twice."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from minpro_megatron.commands import pass_rates
from minpro_megatron.config.run import RunConfig
from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse, SampleFile
from minpro_megatron.launch import own_prompts
from minpro_megatron.launch import pass_rates as work
from minpro_megatron.prompts.prompts import load_prompts
from minpro_megatron.roles.evaluate import Task
from tests.support.calculator_models import write_calculator_model

ROWS = [{"id": f"p{n}", "source": "s", "prompt": f"{n}+1=", "answer": "7", "level": n} for n in (2, 0, 1)]
RIGHT = {"p0": 0, "p1": 3, "p2": 4}  # of four samples
LENGTHS = ["--max-prompt-tokens", "16", "--max-response-tokens", "32"]
LIMIT = 3  # groups that one call samples before it is "interrupted"


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command's options for three prompts of four samples each; sampling is replaced by what stands in `RIGHT`."""
    write_calculator_model(tmp_path / "hf")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))

    def sample(config: RunConfig, file: SampleFile, tasks: Sequence[Task], done: object, wanted: object) -> int:
        for task in tasks[:LIMIT]:
            numbers = range(task.first_sample, task.first_sample + len(task.group.sampling_seeds))
            rewards = [float(number < RIGHT[task.group.prompt.id]) for number in numbers]
            responses = [SampledResponse("7", 1, "stop", reward) for reward in rewards]
            file.append(SampledGroup(work.PROMPTS, 0, task.group.prompt.id, task.first_sample, responses))
        return 0 if len(tasks) <= LIMIT else 1

    monkeypatch.setattr(work, "sample_missing", sample)
    monkeypatch.setattr(own_prompts, "grader_problems", lambda *given: [])  # it starts a process
    names = {"--model": tmp_path / "hf", "--prompts": tmp_path / "in.jsonl", "--output": tmp_path / "out.jsonl"}
    options = [str(part) for pair in names.items() for part in pair]
    return [*options, "--samples", "4", "--reward", "calculator", "--engine", "reference", *LENGTHS]


def test_nothing_is_written_before_every_prompt_has_its_samples(given: list[str], tmp_path: Path) -> None:
    assert pass_rates.main(given) == 1  # three of six groups
    assert not (tmp_path / "out.jsonl").exists()
    assert pass_rates.main(given) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    facts = {"model": str(tmp_path / "hf"), "samples": 4}
    assert rows == [
        row | {"pass_rate": RIGHT[row["id"]] / 4, "measured": facts | {"right": RIGHT[row["id"]]}} for row in ROWS
    ]
    assert [one.pass_rate for one in load_prompts(tmp_path / "out.jsonl", "data.train_file")] == [1.0, 0.0, 0.75]
    report = json.loads((tmp_path / "out.pass_rates.json").read_text())
    # of four samples with three right, every pair has a right one
    assert report["pass_at_k"] == pytest.approx({"1": 1.75 / 3, "2": 2 / 3, "4": 2 / 3})
    assert (report["never_right"], report["always_right"], report["ungraded_responses"]) == (1, 1, 0)


def test_other_bounds_and_the_prompt_file_itself_as_output_sample_nothing_again(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.report.json").write_text("what `minpro prepare` dropped")
    folder = ["--samples-folder", str(tmp_path / "samples")]
    while pass_rates.main([*given, *folder]):
        pass
    monkeypatch.setattr(work, "sample_missing", None)
    written = (tmp_path / "out.jsonl").read_bytes()
    hard = tmp_path / "hard.jsonl"
    bounds = ["--selected", str(hard), "--max-pass-rate", "0.75"]
    assert pass_rates.main([*given, *folder, *bounds, "--output", str(tmp_path / "in.jsonl")]) == 0
    assert (tmp_path / "in.jsonl").read_bytes() == written
    assert (tmp_path / "in.report.json").read_text() == "what `minpro prepare` dropped"
    assert [json.loads(line)["id"] for line in hard.read_text().splitlines()] == ["p0", "p1"]
    assert pass_rates.main([*given, *folder]) == 0  # from the file that has its pass rates
    assert (tmp_path / "out.jsonl").read_bytes() == written


def test_bounds_that_leave_no_row_write_nothing(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given += ["--selected", str(tmp_path / "hard.jsonl"), "--min-pass-rate", "0.1", "--max-pass-rate", "0.2"]
    assert pass_rates.main(given) == 1
    assert pass_rates.main(given) == 2
    line = capsys.readouterr().err
    assert "no prompt is left for --selected; pass rates are from 0 to 1, so widen the bounds" in line
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--max-pass-rate", "0.1"], "select rows for --selected FILE.jsonl: give it too"),
        (["--selected", "x", "--min-pass-rate", "1", "--max-pass-rate", "0"], "--min-pass-rate 1 exceeds"),
        (["--max-pass-rate", "nan"], "'nan' is not a number from 0 to 1"),
        (["--samples", "0"], "'0' is not a whole number above 0"),
    ],
)
def test_impossible_options_are_refused(
    given: list[str], arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        pass_rates.main([*given, *arguments])
    assert problem in capsys.readouterr().err


def test_a_missing_prompt_file_is_named_by_its_option(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert pass_rates.main([*given, "--prompts", "elsewhere.jsonl"]) == 2
    assert "--prompts = 'elsewhere.jsonl': No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--selected", "in.jsonl"], "--selected {0}/in.jsonl is the file of --prompts, which it would replace"),
        (["--selected", "out.jsonl"], "--selected {0}/out.jsonl is the file of --output, which"),
        (["--selected", "link.jsonl"], "--selected {0}/link.jsonl is the file of --prompts, which"),
        (["--selected", "in.jsonl", "--output", "in.jsonl"], "--selected {0}/in.jsonl is the file of --prompts, which"),
        (["--selected", "out.pass_rates.json"], "the report of --output {0}/out.pass_rates.json is the file of --sel"),
    ],
)
def test_no_file_is_written_in_place_of_another(
    given: list[str],
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(work, "sample_missing", None)  # refused before anything is sampled
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in.jsonl")
    before = (tmp_path / "in.jsonl").read_bytes()
    assert pass_rates.main([*given, *(str(tmp_path / one) if "." in one else one for one in arguments)]) == 2
    assert problem.format(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "in.jsonl").read_bytes() == before
