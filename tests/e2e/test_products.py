"""The demonstration of a tool from end to end: a short warm start, and a short run in which the policy calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minpro_megatron.buffer.journal_reader import JournalReader
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.rewards import products
from tests.e2e.conftest import ROOT, TinyModel, convert

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(900)]

NUM_GROUPS, RESPONSES = 12, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """As wide as the demonstration's, and trained for long enough to write calls, most of them wrong ones."""
    folder = tmp_path_factory.mktemp("products")
    made = TinyModel(folder / "hf", folder / "megatron")
    command = [sys.executable, "tools/make_tiny_model.py", "--task", "products", "--steps", "120", "--output", made.hf]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, timeout=500, capture_output=True)
    convert(made)
    return made


def launch(recipe: str, model: TinyModel, runs_dir: Path) -> Path:
    """Two global steps of the recipe; returns the run's folder."""
    words = [f"name={recipe}", f"runs_dir={runs_dir}", f"model.hf_path={model.hf}"]
    words += [f"model.megatron_path={model.megatron}", "num_global_steps=2", "batch.num_prompts=6"]
    words += ["batch.mini_batch_prompts=3", f"batch.responses_per_prompt={RESPONSES}", "checkpoint.every_steps=0"]
    words += ["evaluation.num_prompts=4", "evaluation.samples_per_prompt=2"]
    command = [sys.executable, "-m", "minpro_megatron", "launch", f"recipes.products:{recipe}", *words]
    finished = subprocess.run(command, cwd=ROOT, timeout=400, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
    return runs_dir / recipe


def test_the_policy_reads_the_product_of_what_it_has_called(model: TinyModel, tmp_path: Path) -> None:
    folder = launch("with_tool", model, tmp_path)
    tokenizer = TextTokenizer(str(model.hf), read_model_facts(str(model.hf), []))
    num_calls = 0
    with JournalReader(folder) as journal:
        groups = list(journal.groups())
    assert len(groups) == NUM_GROUPS
    for group in groups:
        prompt = tokenizer.response_text(group.prompt_token_ids)
        for response in group.responses:
            assert response.token_ids is not None
            mask = response.loss_mask
            if mask is None:  # one turn: not a call
                assert len(response.turns) == 1
                assert response.reward == products.grade(
                    tokenizer.response_text(response.token_ids), products.worked(prompt)
                )
                continue
            num_calls += 1
            first, given, last = (
                tokenizer.response_text(response.token_ids[start:stop])
                for start, stop in _spans([turn.sampled_tokens for turn in response.turns], int((mask == 0).sum()))
            )
            assert [turn.tool_calls for turn in response.turns] == [1, 0]
            left, right = first.split("*")
            assert given == f":{int(left) * int(right)}="
            assert response.reward == float(last == products.worked(prompt))
    assert num_calls > NUM_GROUPS * RESPONSES / 8
    steps = _steps(folder)
    assert sum(step["episode/tool_calls"] for step in steps) * NUM_GROUPS * RESPONSES / 2 == pytest.approx(num_calls)
    assert all(step["mismatch/log_prob_abs_mean"] < 1e-4 for step in steps)  # trainer and server read the same


def _spans(sampled: list[int], given: int) -> list[tuple[int, int]]:
    first, last = sampled
    return [(0, first), (first, first + given), (first + given, first + given + last)]


def _steps(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [metrics for metrics in lines if "objective/loss" in metrics]
    assert len(steps) == 2
    return steps


def test_without_the_tool_a_response_is_one_turn(model: TinyModel, tmp_path: Path) -> None:
    folder = launch("without_tool", model, tmp_path)
    with JournalReader(folder) as journal:
        groups = list(journal.groups())
    assert len(groups) == NUM_GROUPS
    assert all(response.loss_mask is None for group in groups for response in group.responses)
    assert all("episode/tool_calls" not in step for step in _steps(folder))
