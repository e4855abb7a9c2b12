"""`eval` around its sampling: what is asked for, what is refused before a server starts, what it leaves."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from minpro_megatron.__main__ import main
from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse, SampleFile
from minpro_megatron.launch import evaluation, evaluation_options
from minpro_megatron.launch.evaluation_options import EvaluationOptions, of_run, run_config, samples_per_prompt
from tests.support.command_errors import errors_of
from tests.support.run_examples import example_config

ROWS = [{"id": f"p{i}", "source": "gsm8k", "prompt": f"{i}+1=", "answer": str(i + 1)} for i in (0, 1, 10)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model without weights (config and a tokenizer of single characters) and a benchmark of three prompts."""
    model = tmp_path / "hf"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"vocab_size": 64, "eos_token_id": 1, "max_position_embeddings": 128})
    )
    characters = ["<unk>", "<eos>", *"0123456789+= "]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(characters)}, "unk_token": "<unk>"},
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


GIVEN = ["--model", "hf", "--output", "out", "--engine", "reference", "--instruction", "none"]
SMALL = ["--max-response-tokens", "32", "--max-prompt-tokens", "16"]


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ([], "required: --benchmarks, or --run"),
        (["--benchmarks", "gsm8k,gsm8k"], "expected distinct names"),
        (["--benchmarks", "gsm8k", "--samples", "0"], "'0' is not a whole number above 0"),
        (["--benchmarks", "gsm8k", "--samples", "aime24=2"], "--samples aime24=...: it is not among --benchmarks"),
        (["--benchmarks", "gsm8k", "--top-p", "0"], r"^--top-p: .*greater than 0.*\(got 0.0\)"),
        (
            ["--benchmarks", "aime24"],
            r"aime24: data/aime24.jsonl: no such file; make it with `minpro prepare aime24`",
        ),
        (["--benchmarks", "mine"], r"mine: data/mine.jsonl: no such file; give --benchmark-file mine=PATH"),
        (["--benchmarks", "gsm8k", "--num-prompts", "4"], "gsm8k.jsonl has only 3 rows; lower it"),
        (
            ["--benchmarks", "gsm8k", "--max-prompt-tokens", "4"],
            "1 prompts, such as 'p10', are longer than --max-prompt-tokens = 4",
        ),
        (["--benchmarks", "gsm8k", "--reward", "maths"], "--reward = 'maths': there is no such reward"),
        (["--benchmarks", "gsm8k", "--urls", "localhost:1"], "^--urls: 'localhost:1' must be like http"),
        (
            ["--benchmarks", "gsm8k", "--max-response-tokens", "500"],
            "^--max-prompt-tokens . --max-response-tokens . 8 = 524 exceeds the model's max_position_embeddings = 128",
        ),
        (["--benchmarks", "gsm8k", "--instruction", "Solve"], "^--instruction = 'Solve' must be one of"),
        (["--benchmarks", "gsm8k", "--chat-template-arguments", "[]"], "not a JSON object"),
        (["--benchmarks", "gsm8k", "--api-key-variable", "NO_SUCH_KEY"], "'NO_SUCH_KEY': this environment variable"),
        (
            ["--benchmarks", "gsm8k", "--compare", "elsewhere"],
            "elsewhere/results.json: No such file.*--output of another",
        ),
        (["--benchmarks", "gsm8k", "--model", "data"], "^--model = 'data': the file config.json is missing"),
    ],
)
def test_problems_are_reported_before_a_server_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], pattern: str
) -> None:
    (line, *_) = errors_of(capsys, "eval", *GIVEN, *SMALL, *arguments)
    assert re.search(pattern, line), line
    assert not (folder / "out").exists()


def test_every_missing_file_has_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = errors_of(capsys, "eval", *GIVEN, *SMALL, "--benchmarks", "aime24,gsm8k,amc23")
    assert [line.split(":")[0] for line in lines] == ["--benchmarks aime24", "--benchmarks amc23"]


def options(**given: object) -> EvaluationOptions:
    return EvaluationOptions(model="hf", benchmarks=["aime25", "gsm8k"], output=Path("out"), **given)  # type: ignore[arg-type]


def test_the_papers_protocol_is_the_default() -> None:
    config = run_config(options())
    assert samples_per_prompt(options()) == {"aime25": 128, "gsm8k": 2}
    assert (config.evaluation.temperature, config.evaluation.top_p) == (1.0, 0.7)
    assert config.sampling.max_response_tokens == 20480
    assert config.reward.function == "math"


def test_samples_for_all_and_for_some() -> None:
    assert samples_per_prompt(options(samples={"": 4})) == {"aime25": 4, "gsm8k": 4}
    assert samples_per_prompt(options(samples={"gsm8k": 8})) == {"aime25": 128, "gsm8k": 8}


def test_options_reach_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_options, "count_gpus", lambda: 2)
    server = run_config(
        options(settings={"server.tensor_parallel": 2, "server.count": 3, "server.urls": ["http://h:1"]})
    ).server
    assert (server.device, server.dtype, server.tensor_parallel, server.count) == ("cuda", "bfloat16", 2, 3)
    assert server.urls == ["http://h:1"]
    monkeypatch.setattr(evaluation_options, "count_gpus", lambda: 0)
    server = run_config(options(settings={"server.dtype": "bfloat16"})).server
    assert (server.device, server.dtype) == ("cpu", "bfloat16")


COMPLETE = [*GIVEN, *SMALL, "--benchmarks", "gsm8k", "--samples", "4", "--reward", "calculator"]


@pytest.fixture
def sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Servers are left out: a task's samples are there at once, the first of each prompt right. What was asked for."""
    asked: list[int] = []

    def sample(config: object, file: SampleFile, tasks: list, done: list, wanted: dict) -> int:
        asked.append(len(tasks))
        assert wanted == {"gsm8k": 12}
        for task in tasks:
            firsts = [task.first_sample + i for i in range(len(task.group.sampling_seeds))]
            responses = [SampledResponse(str(i), 2, "stop", float(i == 0)) for i in firsts]
            file.append(SampledGroup("gsm8k", 0, task.group.prompt.id, task.first_sample, responses))
        return 0

    monkeypatch.setattr(evaluation, "sample_missing", sample)
    return asked


def test_outputs_and_going_on(folder: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *COMPLETE]) == 0
    first = capsys.readouterr().out
    results = msgspec.json.decode((folder / "out" / "results.json").read_bytes(), type=evaluation.Scores)
    assert results.benchmarks[0].accuracy.value == 0.25
    assert results.benchmarks[0].pass_at_k[4].value == 1.0
    assert "| hf | 25.0 (25.0-25.0) | 25.0 (25.0-25.0) |" in (folder / "out" / "table.md").read_text()
    assert (folder / "out" / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "out" / "tensorboard").iterdir())
    assert "out/table.md" in first
    lines = (folder / "out" / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "out" / "samples.jsonl").write_text("".join(lines[:2]) + lines[2][:30])
    assert main(["eval", *COMPLETE]) == 0
    assert main(["eval", *COMPLETE]) == 0  # all is there: only the figures are made again
    assert sampled == [6, 4]
    assert sorted((folder / "out" / "samples.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)
    assert len((folder / "out" / "metrics.jsonl").read_text().splitlines()) == 1
    assert capsys.readouterr().out.count(first.splitlines()[-1]) == 2


def test_a_runs_own_wording_limits_and_reward_are_used(
    folder: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "model": {"hf_path": "hf", "megatron_path": "", "dtype": "float32"},
        "data": {"train_file": "", "heldout_file": "data/gsm8k.jsonl", "instruction": "boxed {question}"},
        "sampling": {"max_prompt_tokens": 24, "max_response_tokens": 30, "extra_stop_tokens": []},
        "reward": {"function": "calculator", "right_reward": 1.0, "by_source": {"other": "math"}},
        "evaluation": {"num_prompts": 1, "temperature": 0.5, "top_p": 0.9, "samples_per_prompt": 4},
        "name": "mine",
    }
    run = example_config(folder, **changes)
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "run.json").write_text(run.to_json())
    given = ["--run", str(run.run_dir), "--output", "out", "--engine", "reference"]
    (line,) = errors_of(capsys, "eval", *given)
    assert line.startswith(
        f"--run {run.run_dir}: there are no exported weights in {run.run_dir}/hf_export yet; give --m"
    )
    (folder / "hf").rename(run.run_dir / "hf_export")
    given += ["--benchmarks", "gsm8k", "--samples", "4", "--top-p", "0.8"]
    assert main(["eval", *given]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "wording: instruction 'boxed {question}', without a chat template; at most 24 prompt and 30 response tokens; "
        f"temperature 0.5, top-p 0.8; reward calculator; from {run.run_dir}/run.json unless given"
    )
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["settings"]["instruction"] == "boxed {question}"
    asked = run_config(EvaluationOptions(**of_run(run, {"output": Path("out"), "model": "hf"})))
    assert asked.reward.by_source == {"calculator": "calculator", "other": "math"}
    own = of_run(run, {"output": Path("out"), "model": "hf"})
    assert (own["benchmarks"], own["samples"]) == (["heldout"], {"heldout": 4})


def test_another_protocol_does_not_go_on(folder: Path, sampled: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", *COMPLETE]) == 0
    capsys.readouterr()
    (line,) = errors_of(capsys, "eval", *COMPLETE, "--temperature", "0.6")
    assert "out holds samples of other settings (temperature: 1.0 -> 0.6)" in line
    (folder / "data" / "gsm8k.jsonl").write_text("".join(json.dumps(row | {"answer": "0"}) + "\n" for row in ROWS))
    (line,) = errors_of(capsys, "eval", *COMPLETE)
    assert "benchmarks.gsm8k.prompts_digest: " in line
    (folder / "hf" / "config.json").touch()
    assert "model_files: " in errors_of(capsys, "eval", *COMPLETE)[0]


def test_other_evaluations_are_rows_of_the_same_table(folder: Path, sampled: list[int]) -> None:
    assert main(["eval", *COMPLETE]) == 0
    (folder / "hf").rename(folder / "trained")
    second = ["--model", "trained", "--output", "two", "--compare", "out"]
    assert main(["eval", *COMPLETE, *second]) == 0
    accuracy = (folder / "two" / "table.md").read_text().split("### AIME")[0]
    assert accuracy.index("| hf | 25.0") < accuracy.index("| trained | 25.0")
