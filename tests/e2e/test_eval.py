"""`eval` as a command: each engine on a slice of GSM8K; killed and gone on; on servers of others."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import requests
import torch

from minpro_megatron.config.run import RunConfig
from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse
from minpro_megatron.evaluation.scores import Scores
from minpro_megatron.records import EvaluationResult
from minpro_megatron.rewards import mathematics
from minpro_megatron.rewards.registry import Grade
from minpro_megatron.serving.server_process import ServerProcess, stop_servers
from tests.e2e.conftest import ROOT, Launcher, TinyModel
from tests.e2e.evaluation_figures import check_figures

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine's stand-ins are not for GPU machines"),
]

# The first rows of GSM8K's test split that a tiny model's context holds (arXiv:2110.14168).
GSM8K = {
    "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total does it take?": "3",
    "James decides to run 3 sprints 3 times a week.  He runs 60 meters each sprint.  How many total meters does he run "
    "a week?": "540",
    "Toulouse has twice as many sheep as Charleston. Charleston has 4 times as many sheep as Seattle. How many sheep "
    "do Toulouse, Charleston, and Seattle have together if Seattle has 20 sheep?": "260",
}
GSM8K_FILE = ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl"
NUM_SAMPLES = 4
# A random model answers nothing: with this reward it is right now and then.
EVEN_DIGIT = """
from minpro_megatron.rewards.registry import Grade

def grade(text, answer):
    digits = [c for c in text if c.isdigit()]
    return Grade(float(bool(digits) and digits[-1] in "02468"), digits[-1] if digits else None)
"""

# And with this one where the last digit is as even or odd as the answer: answers that are mixed up are noticed.
SAME_PARITY = """
from minpro_megatron.rewards.registry import Grade

def grade(text, answer):
    digits = [c for c in text if c.isdigit()]
    is_right = bool(digits) and (digits[-1] in "02468") == (answer[-1] in "02468")
    return Grade(float(is_right), digits[-1] if digits else None)
"""


def even_digit(text: str, answer: str) -> Grade:
    digits = re.findall("[0-9]", text)
    return Grade(float(int(digits[-1]) % 2 == 0), digits[-1]) if digits else Grade(0.0)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "even_digit.py").write_text(EVEN_DIGIT)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    rows = [
        {"id": f"gsm8k-test-{index}", "source": "gsm8k", "prompt": question, "answer": answer}
        for index, (question, answer) in enumerate(GSM8K.items())
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def command(model: TinyModel, data: Path, output: Path, *more: str) -> list[str]:
    options = {
        "--model": model.hf,
        "--benchmarks": "gsm8k",
        "--data": data,
        "--output": output,
        "--samples": NUM_SAMPLES,
        "--instruction": "none",
        "--max-prompt-tokens": 400,
        "--max-response-tokens": 40,
        "--start-timeout-s": 150,
    }
    given = [str(part) for pair in options.items() for part in pair]
    return [sys.executable, "-m", "minpro_megatron", "eval", *given, *more]


def finish(arguments: list[str]) -> str:
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def samples(output: Path) -> list[SampledGroup]:
    lines = (output / "samples.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=SampledGroup) for line in lines]


def results(output: Path) -> Scores:
    return msgspec.json.decode((output / "results.json").read_bytes(), type=Scores)


def check_complete(output: Path, grade: Callable[[str, str], Grade] = even_digit) -> float:
    """Every prompt has its samples once, graded as the reward grades them, and the figures are the samples'. Returns
    the accuracy."""
    groups = samples(output)
    keys = [(group.prompt_id, group.first_sample) for group in groups]
    assert sorted(keys) == [(f"gsm8k-test-{i}", first) for i in range(len(GSM8K)) for first in (0, 2)]
    answers = list(GSM8K.values())
    num_right = 0
    for group in groups:
        answer = answers[int(group.prompt_id.rpartition("-")[2])]
        for response in group.responses:
            graded = grade(response.text, answer)
            assert (response.reward, response.extracted, response.problem) == (graded.reward, graded.extracted, None)
            assert 1 <= response.num_tokens <= 40
            num_right += graded.reward == 1
    (scores,) = results(output).benchmarks
    assert (scores.name, scores.num_prompts, scores.samples_per_prompt) == ("gsm8k", len(GSM8K), NUM_SAMPLES)
    assert scores.accuracy.value == pytest.approx(num_right / (len(GSM8K) * NUM_SAMPLES))
    assert sorted(scores.pass_at_k) == [1, 2, 3, 4]
    return scores.accuracy.value


def processes_of(output: Path) -> list[psutil.Process]:
    """Those with the evaluation's folder in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(output) in " ".join(process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.parametrize("engine", ["reference", pytest.param("sglang", marks=pytest.mark.long)])
def test_a_slice_of_gsm8k(tiny_model: TinyModel, data: Path, tmp_path: Path, engine: str) -> None:
    output = tmp_path / "out"
    printed = finish(command(tiny_model, data, output, "--engine", engine, "--device", "cpu"))
    check_complete(output, mathematics.grade)
    assert "12/12 responses" in printed
    assert "GSM8K avg@4" in (output / "table.md").read_text()
    assert (output / "pass_at_k.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((output / "metrics.jsonl").read_text())["metrics"]
    assert metrics["evaluation/accuracy/gsm8k"] == results(output).benchmarks[0].accuracy.value
    assert list((output / "tensorboard").iterdir())
    assert processes_of(output) == []


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Twelve of GSM8K's rows that fit the context, with the last digit of their answers; as the evaluation wants them
    they are in tmp_path/data."""
    if not GSM8K_FILE.exists():
        pytest.skip(f"needs {GSM8K_FILE}")
    rows = [line for line in GSM8K_FILE.read_text().splitlines() if len(json.loads(line)["question"]) <= 300][:12]
    (tmp_path / "raw.jsonl").write_text("".join(row + "\n" for row in rows))
    prepared = tmp_path / "data" / "gsm8k.jsonl"
    prepared.parent.mkdir()
    prepare = ["tools/prepare_data.py", "gsm8k", "--input", str(tmp_path / "raw.jsonl"), "--output", str(prepared)]
    finish([sys.executable, *prepare])
    (tmp_path / "same_parity.py").write_text(SAME_PARITY)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    ids = {row["prompt"]: row["id"] for row in map(json.loads, prepared.read_text().splitlines())}
    return {ids[row["question"].strip()]: row["answer"].strip()[-1] for row in map(json.loads, rows)}


@pytest.mark.long
@pytest.mark.parametrize("engine", ["reference", "sglang"])
def test_rows_of_gsm8k_from_their_file_to_figures(
    tiny_model: TinyModel, questions: dict[str, str], tmp_path: Path, engine: str
) -> None:
    """Graded as the raw file's answers say, and all figures are those of the stored samples."""
    output = tmp_path / "out"
    engine_options = ["--engine", engine, "--device", "cpu", "--reward", "same_parity:grade"]
    finish(command(tiny_model, tmp_path / "data", output, *engine_options))
    found: dict[str, dict[int, SampledResponse]] = {prompt_id: {} for prompt_id in questions}
    for group in samples(output):
        found[group.prompt_id].update(enumerate(group.responses, start=group.first_sample))
    assert all(sorted(of_prompt) == list(range(NUM_SAMPLES)) for of_prompt in found.values())
    for prompt_id, last_digit in questions.items():
        for response in found[prompt_id].values():
            digits = re.findall("[0-9]", response.text)
            is_right = bool(digits) and int(digits[-1]) % 2 == int(last_digit) % 2
            assert (response.reward == 1, response.extracted) == (is_right, digits[-1] if digits else None)
            assert response.num_tokens == 40 or (response.num_tokens < 40 and response.finish_reason == "stop")
    check_figures(results(output), [list(of_prompt.values()) for of_prompt in found.values()])
    metrics = json.loads((output / "metrics.jsonl").read_text())["metrics"]
    assert metrics["evaluation/accuracy/gsm8k"] == results(output).benchmarks[0].accuracy.value


@pytest.mark.long
def test_a_killed_evaluation_goes_on(tiny_model: TinyModel, data: Path, tmp_path: Path) -> None:
    """The reference engine gives the same tokens for the same seed, so both ways end with the same samples."""
    reference = ["--engine", "reference", "--max-running-requests", "1", "--reward", "even_digit:grade"]
    killed = command(tiny_model, data, tmp_path / "killed", *reference)
    process = subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, deadline = tmp_path / "killed" / "samples.jsonl", time.monotonic() + 100
    while not (path.is_file() and path.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = path.read_bytes()
    finish(killed)
    assert 0 < check_complete(tmp_path / "killed") < 1
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    finish(command(tiny_model, data, tmp_path / "whole", *reference))
    in_order = [sorted(samples(tmp_path / name), key=lambda group: group.key) for name in ("killed", "whole")]
    assert in_order[0] == in_order[1]
    scores = [msgspec.structs.replace(results(tmp_path / name), settings={}) for name in ("killed", "whole")]
    assert scores[0] == scores[1]


@pytest.fixture
def server(tiny_model: TinyModel, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that somebody else has started, with weights that are called version 3."""
    config = RunConfig.model_validate(
        {
            "name": "other",
            "runs_dir": str(tmp_path),
            "device": "cpu",
            "model": {"hf_path": str(tiny_model.hf), "megatron_path": "", "dtype": "float32"},
            "data": {"train_file": "", "heldout_file": ""},
            "sampling": {"max_prompt_tokens": 400, "max_response_tokens": 40},
            "server": {"engine": "reference", "device": "cpu", "dtype": "float32"},
        }
    )
    process = ServerProcess(config, 0)
    process.start()
    try:
        assert process.wait_until_ready(120)
        name_weights(process, 3)
        yield process
    finally:
        stop_servers([process])


def name_weights(process: ServerProcess, version: int) -> None:
    url = f"{process.address.url}/update_weight_version"
    requests.post(url, json={"new_version": str(version)}, timeout=30).raise_for_status()


@pytest.mark.long
def test_servers_of_others_at_a_later_version(
    tiny_model: TinyModel, data: Path, tmp_path: Path, server: ServerProcess
) -> None:
    output = tmp_path / "out"
    arguments = command(tiny_model, data, output, "--urls", server.address.url, "--reward", "even_digit:grade")
    finish(arguments)
    check_complete(output)
    assert results(output).policy_version == 3
    assert server.exit_status is None
    # two samples more to take, but the servers have moved on
    lines = (output / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (output / "samples.jsonl").write_bytes(b"".join(lines[:-1]))
    name_weights(server, 4)
    refused = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert refused.returncode == 1
    assert "the servers hold version 4 of the weights" in refused.stderr
    assert "are of version 3: give another --output" in refused.stderr
    name_weights(server, 3)
    finish(arguments)
    check_complete(output)


@pytest.mark.long
def test_it_ends_with_its_servers_on_request(tiny_model: TinyModel, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = command(tiny_model, data, output, "--engine", "reference")
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (output / "servers" / "logs" / "server-0.log").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 143, errors
    assert "run the same command again to continue" in errors
    assert processes_of(output) == []


@pytest.mark.long
def test_benchmarks_inside_a_run(launches: Launcher, data: Path, tmp_path: Path) -> None:
    """At the first and the last version, beside the held-out prompts; staleness is what it was."""
    benchmarks = [{"name": "gsm8k", "file": str(data / "gsm8k.jsonl"), "samples_per_prompt": 3}]
    settings = ["num_global_steps=2", "server.engine=reference", "evaluation.num_prompts=4"]
    # questions are longer than the demo's prompts
    settings += ["sampling.max_prompt_tokens=400", f"evaluation.benchmarks={json.dumps(benchmarks)}"]
    launch = launches("benchmarks", *settings, 'reward.by_source={"gsm8k": "even_digit:grade"}')
    status, output = launch.wait(170)
    assert status == 0, output
    lines = (launch.run_dir / "evaluations.jsonl").read_bytes().splitlines()
    found = [msgspec.json.decode(line, type=EvaluationResult) for line in lines]
    told = sorted((result.policy_version, result.benchmark, result.samples_per_prompt) for result in found)
    assert told == [(0, "", 8), (0, "gsm8k", 3), (2, "", 8), (2, "gsm8k", 3)]
    entries = [json.loads(line) for line in (launch.run_dir / "metrics.jsonl").read_text().splitlines()]
    shown = {entry["step"]: value for entry in entries for name, value in entry["metrics"].items() if "gsm8k" in name}
    assert sorted(shown) == [0, 2]
    summary = json.loads((launch.run_dir / "summary.json").read_text())
    assert (summary["smallest_staleness"], summary["largest_staleness"]) == (0, 1)
    assert summary["num_evaluation_samples"] == 4 * 8
    assert [result for result in found if result.benchmark and 0 < result.pass_at_1 < 1]
