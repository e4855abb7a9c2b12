"""Pass rates from end to end: sampled by servers of the reference engine, killed, and resumed to the same bytes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e import digits_reward
from tests.e2e.conftest import ROOT, TinyModel

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

NUM_PROMPTS, NUM_SAMPLES = 6, 8


def command(model: TinyModel, prompts: Path, output: Path) -> list[str]:
    options = ["--model", model.hf, "--prompts", prompts, "--output", output, "--samples", NUM_SAMPLES]
    options += ["--max-response-tokens", 20, "--max-prompt-tokens", 12, "--max-running-requests", 1]
    options += ["--engine", "reference", "--reward", f"{digits_reward.__name__}:grade"]
    return [sys.executable, "-m", "minpro_megatron", "pass-rates", *map(str, options)]


@pytest.mark.long
def test_a_killed_measurement_goes_on_to_the_same_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    rows = [{"id": f"p{n}", "source": "test", "prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(NUM_PROMPTS)]
    rows[1]["prefix"] = "1,2"  # the model continues it, and the reward sees it
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = [tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"]

    killed = command(tiny_model, prompts, outputs[0])
    process = subprocess.Popen(killed, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    samples, deadline = outputs[0].with_suffix(".pass_rates") / "samples.jsonl", time.monotonic() + 150
    while not (samples.is_file() and samples.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = samples.read_bytes()
    assert not outputs[0].exists()

    for output in outputs:
        subprocess.run(command(tiny_model, prompts, output), cwd=ROOT, check=True, timeout=170, capture_output=True)
    assert samples.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert outputs[0].read_bytes() == outputs[1].read_bytes()

    drawn = [json.loads(line) for line in samples.read_text().splitlines()]
    right: dict[str, int] = dict.fromkeys((str(row["id"]) for row in rows), 0)
    for group in drawn:
        prefix = rows[int(group["prompt_id"][1:])].get("prefix", "")
        graded = [digits_reward.grade(prefix + response["text"], "") for response in group["responses"]]
        assert graded == [response["reward"] for response in group["responses"]]
        right[group["prompt_id"]] += int(sum(graded))
    assert sum(len(group["responses"]) for group in drawn) == NUM_PROMPTS * NUM_SAMPLES
    assert 0 < sum(right.values()) < NUM_PROMPTS * NUM_SAMPLES
    written = [json.loads(line) for line in outputs[0].read_text().splitlines()]
    assert [row["pass_rate"] for row in written] == [right[row["id"]] / NUM_SAMPLES for row in written]
    assert [{name: row[name] for name in given} for row, given in zip(written, rows, strict=True)] == rows
