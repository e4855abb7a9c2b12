"""Prefixes from end to end: sampled and cut by the tool, trained on by a run, with servers of the reference engine."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.buffer.journal_reader import JournalReader
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.prompts import load_prompts
from minpro_megatron.prompts.tokenizer import TextTokenizer
from tests.e2e import digits_reward
from tests.e2e.conftest import ROOT, Launcher, TinyModel
from tests.e2e.engine_mismatch import responses_that_differ

pytestmark = pytest.mark.e2e

NUM_PROMPTS, MAX_SAMPLES = 6, 12
REWARD = f"{digits_reward.__name__}:grade"


def run_tool(model: TinyModel, folder: Path, output: str = "train.jsonl", *others: object) -> None:
    """Makes the output in the folder, with `others` of the command's options."""
    rows = [{"id": f"p{n}", "source": "test", "prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(NUM_PROMPTS)]
    (folder / "hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", model.hf, "--prompts", folder / "hard.jsonl", "--output", folder / output, *others]
    options += [] if others else ["--max-samples", MAX_SAMPLES]
    options += ["--max-response-tokens", 20, "--max-prompt-tokens", 8 if output == "train.jsonl" else 40]
    options += ["--engine", "reference", "--reward", REWARD]
    command = [sys.executable, "tools/build_prefixes.py", *map(str, options)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=170, capture_output=True)


@pytest.mark.long
def test_a_run_goes_on_from_prefixes_that_the_tool_has_cut(
    tiny_model: TinyModel, launches: Launcher, tmp_path: Path
) -> None:
    run_tool(tiny_model, tmp_path)
    prompts = {prompt.id: prompt for prompt in load_prompts(tmp_path / "train.jsonl", "data.train_file")}
    report = json.loads((tmp_path / "train.report.json").read_text())
    plain = [prompt for prompt in prompts.values() if not prompt.prefix]
    assert 0 < len(plain) == report["plain_rows"] <= NUM_PROMPTS
    assert len(plain) < report["prefixed_rows"] == len(prompts) - len(plain)
    assert report["samples"] <= NUM_PROMPTS * MAX_SAMPLES

    settings = ["server.engine=reference", "num_global_steps=2", "staleness.delay_steps=1", "parallel.tensor=1"]
    settings += ["parallel.expert=1", "evaluation.num_prompts=2", "evaluation.samples_per_prompt=2"]
    settings += ["batch.num_prompts=16", "batch.mini_batch_prompts=8", "batch.responses_per_prompt=4"]
    settings += [
        "sampling.max_prompt_tokens=40",
        "sampling.max_response_tokens=20",
        f"data.train_file={tmp_path / 'train.jsonl'}",
    ]
    launch = launches("prefixed", *settings, f"reward.function={REWARD}", "checkpoint.every_steps=0")
    status, output = launch.wait(170)
    assert status == 0, output

    tokenizer = TextTokenizer(str(tiny_model.hf), read_model_facts(str(tiny_model.hf), []))
    kinds = set()
    with JournalReader(launch.run_dir) as journal:
        groups = list(journal.groups())
        assert len(groups) == 32
        for group in groups:
            prompt = prompts[group.prompt_id]
            kinds.add(bool(prompt.prefix))
            expected = np.concatenate(tokenizer.encode_all([prompt.text, prompt.prefix]))
            assert group.prompt_token_ids.tolist() == expected.tolist()
            for response in group.responses:
                assert response.token_ids is not None
                assert response.ratios is not None
                # ratios are the response's alone
                assert len(response.token_ids) == len(response.ratios) <= 20
                assert response.reward == digits_reward.grade(
                    prompt.prefix + tokenizer.response_text(response.token_ids), ""
                )
    assert kinds == {True, False}

    lines = [json.loads(line)["metrics"] for line in (launch.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [metrics for metrics in lines if "objective/loss" in metrics]
    assert len(steps) == 2
    for metrics in steps:
        assert {"reward/accuracy_by_prompt/plain", "reward/accuracy_by_prompt/prefixed"} <= metrics.keys()
        assert metrics["mismatch/log_prob_abs_mean"] < 1e-4
    assert responses_that_differ(launch.run_dir) <= 1  # server and trainer have the same context

    run_tool(tiny_model, tmp_path, "again.jsonl", "--runs", launch.run_dir, "--bands", "0.05:0.95", "--cut-samples", 4)
    check_traces_of_the_run(tmp_path, launch.run_dir, tokenizer)
    check_measured_cuts(tmp_path)


def check_traces_of_the_run(folder: Path, run_dir: Path, tokenizer: TextTokenizer) -> None:
    """Each prefix begins a correct response of the run to its problem, token by token."""
    rows = [json.loads(line) for line in (folder / "again.jsonl").read_text().splitlines()]
    prefixed = [row for row in rows if "prefix" in row]
    assert prefixed
    right: dict[str, list[list[int]]] = {}
    with JournalReader(run_dir) as journal:
        for group in journal.groups():
            problem = group.prompt_id.partition("#")[0]
            (question,) = tokenizer.encode_all([next(row["prompt"] for row in rows if row["id"] == problem)])
            given = group.prompt_token_ids[len(question) :].tolist()
            for response in group.responses:
                if response.reward == 1.0 and response.finish_reason == "stop":
                    assert response.token_ids is not None
                    sampled = np.asarray([*given, *response.token_ids[:-1]], np.int32)
                    text = tokenizer.response_text(sampled)
                    # a text without the special tokens that random weights sample has tokens of its own
                    tokens = sampled if tokenizer.text(sampled) == text else tokenizer.encode_all([text])[0]
                    right.setdefault(problem, []).append(tokens.tolist())
    for row in prefixed:
        (tokens,) = tokenizer.encode_all([row["prefix"]])
        assert row["trace"]["from"] == "run prefixed"
        assert row["trace"]["given"] == len(tokens)
        traces = [trace for trace in right[row["id"].partition("#")[0]] if len(trace) == row["trace"]["tokens"]]
        assert any(trace[: len(tokens)] == tokens.tolist() for trace in traces)


def check_measured_cuts(folder: Path) -> None:
    """A prefixed row's pass rate is in the band, and that of the samples behind its prefix."""
    rows = [json.loads(line) for line in (folder / "again.jsonl").read_text().splitlines()]
    sampled: dict[str, list[float]] = {}
    for line in (folder / "again.samples" / "samples.jsonl").read_text().splitlines():
        group = json.loads(line)
        assert group["benchmark"] == "cuts"
        sampled.setdefault(group["prompt_id"], []).extend(response["reward"] for response in group["responses"])
    for row in rows:
        if "prefix" in row:
            place = f"{row['id'].partition('#')[0]}#cut-{row['trace']['given']}-of-"
            (rewards,) = [found for name, found in sampled.items() if name.startswith(place)]
            assert (len(rewards), row["pass_rate"]) == (4, sum(rewards) / 4)
            assert 0.05 <= row["pass_rate"] <= 0.95
