"""tools/replay_rollouts.py as a process of its own, against transformers, autograd and torch's AdamW on one process."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.e2e.conftest import ROOT
from tests.mesh.reference import COMMON, decayed_groups, make_model, saved_tensors

pytestmark = pytest.mark.e2e

# AdamW turns rounding in gradients near zero into whole steps; at a higher rate they show in the second update.
LEARNING_RATE, WEIGHT_DECAY, CLIP_GRAD = 2e-4, 0.05, 0.5
# name -> (rows, kinds of reward); rows of a group need not stand together
GROUPS = [("a", 3, 2), ("equal", 2, 1), ("b", 3, 3), ("alone", 1, 2), ("c", 2, 2), ("a", 1, 2)]


def rollouts(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Groups with holes in their masks, equal rewards, one row, a response without tokens and one without mask."""
    random = np.random.default_rng(11)
    rows = []
    for group, count, rewards in GROUPS:
        for member in range(count):
            prompt, response = int(random.integers(1, 7)), int(random.integers(4, 30))
            response = 0 if (group, member) == ("b", 2) else response
            ids = random.integers(0, COMMON["vocab_size"], prompt + response)
            row = {"group": group, "prompt_ids": ids[:prompt].tolist(), "response_ids": ids[prompt:].tolist()}
            with torch.no_grad():
                drifted = log_probs(model, row).numpy() + random.normal(0, 0.6, response)
            row |= {"behavior_log_probs": np.minimum(drifted, 0).tolist(), "reward": float(member % rewards)}
            if member % 2:
                row |= {"loss_mask": (random.random(response) > 0.3).astype(int).tolist(), "note": "not read"}
            rows.append(row)
    return rows


def log_probs(model: PreTrainedModel, row: dict[str, Any]) -> Tensor:
    ids, first = torch.tensor(row["prompt_ids"] + row["response_ids"]), len(row["prompt_ids"])
    log_softmax = model(ids[None]).logits[0].log_softmax(-1)
    return log_softmax[first - 1 : -1].gather(1, ids[first:, None])[:, 0]


def mask_of(row: dict[str, Any]) -> list[int]:
    return row.get("loss_mask", [1] * len(row["response_ids"]))


def advantages(rows: Sequence[dict[str, Any]]) -> list[float]:
    found = []
    for row in rows:
        rewards = np.array([other["reward"] for other in rows if other["group"] == row["group"]])
        spread = rewards.std(ddof=1) if len(rewards) > 1 else 0.0
        found.append(0.0 if spread == 0 else float((row["reward"] - rewards.mean()) / (spread + 1e-6)))
    return found


@dataclass
class TokenValues:
    """What a token is worth in the loss, given everything of its mini-batch; lists by row, then by token."""

    coefficients: list[list[float]]
    prefix_min: list[list[float]]


def prefix_minima(ratios: Sequence[float], mask: Sequence[int]) -> list[float]:
    """The least ratio of the trained tokens before each token; 1 if there are none."""
    return [
        min((ratio for ratio, trained in zip(ratios[:t], mask[:t], strict=True) if trained), default=1.0)
        for t in range(len(ratios))
    ]


def minpro(ratios: list[list[float]], masks: list[list[int]], scales: list[float]) -> TokenValues:
    minima = [prefix_minima(ratio, mask) for ratio, mask in zip(ratios, masks, strict=True)]
    coefficients = [
        [min(m * rho, 5.0) * scale * trained for m, rho, trained in zip(minimum, ratio, mask, strict=True)]
        for minimum, ratio, mask, scale in zip(minima, ratios, masks, scales, strict=True)
    ]
    return TokenValues(coefficients, minima)


def m2po(ratios: list[list[float]], masks: list[list[int]], scales: list[float]) -> TokenValues:
    """arXiv:2510.01161, Algorithm 1: the largest squares go until the mean of the harmful ones is 0.04."""
    minima = [prefix_minima(ratio, mask) for ratio, mask in zip(ratios, masks, strict=True)]
    places = [(row, t) for row, mask in enumerate(masks) for t, trained in enumerate(mask) if trained]
    squares = {(row, t): float(np.log(ratios[row][t]) ** 2) for row, t in places}
    harmful = sorted((p for p in places if scales[p[0]] * np.log(ratios[p[0]][p[1]]) > 0), key=lambda p: squares[p])
    left_out = set()
    while harmful and np.mean([squares[place] for place in harmful]) > 0.04:
        left_out.add(harmful.pop())
    assert left_out
    assert harmful
    coefficients = [
        [rho * scale * trained * ((row, t) not in left_out) for t, (rho, trained) in enumerate(zip(*both, strict=True))]
        for row, (scale, both) in enumerate(zip(scales, zip(ratios, masks, strict=True), strict=True))
    ]
    return TokenValues(coefficients, minima)


def mini_batches(rows: Sequence[dict[str, Any]], groups: int) -> list[list[int]]:
    names = list(dict.fromkeys(row["group"] for row in rows))
    chosen = [names[first : first + groups] for first in range(0, len(names), groups)]
    return [[row for name in some for row, given in enumerate(rows) if given["group"] == name] for some in chosen]


def expected_replay(model: PreTrainedModel, rows: list[dict], objective: str, groups: int) -> tuple[list, dict, dict]:
    """(updates, per-token values by row, weights afterwards); two updates, which change `model`."""
    scales = advantages(rows)
    batches, updates, tokens = mini_batches(rows, groups), [], {}
    adam = torch.optim.AdamW(decayed_groups(model, WEIGHT_DECAY), lr=LEARNING_RATE, betas=(0.9, 0.999))
    for batch in batches:
        with torch.no_grad():
            found = [log_probs(model, rows[row]) for row in batch]
        values = values_of(objective, rows, batch, found, scales)
        for index, row in enumerate(batch):
            tokens[row] = {
                "log_probs": found[index].tolist(),
                "coefficients": values.coefficients[index],
                "prefix_min": values.prefix_min[index],
                "advantage": scales[row],
            }
    for batch in batches:
        adam.zero_grad()
        found = [log_probs(model, rows[row]) for row in batch]
        values = values_of(objective, rows, batch, found, scales)
        parts = [torch.tensor(c) for c in values.coefficients]
        slope = -sum((c * own).sum() for c, own in zip(parts, found, strict=True))
        count = sum(sum(mask_of(rows[row])) for row in batch)
        assert isinstance(slope, Tensor)
        (slope / count).backward()
        # minpro's loss is what is differentiated; m2po's is - rho A, whose derivative has the same coefficients
        loss = slope.item() if objective == "minpro" else -sum(float(c.sum()) for c in parts)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        adam.step()
        updates.append({"loss": loss / count, "grad_norm": float(norm), "num_tokens": count})
    return updates, tokens, saved_tensors(model)


def values_of(objective: str, rows: list, batch: list[int], found: list[Tensor], scales: list[float]) -> TokenValues:
    ratios = [
        np.exp(own.detach().numpy() - np.array(rows[row]["behavior_log_probs"])).tolist()
        for row, own in zip(batch, found, strict=True)
    ]
    return {"minpro": minpro, "m2po": m2po}[objective](
        ratios, [mask_of(rows[row]) for row in batch], [scales[row] for row in batch]
    )


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay") / "hf"
    make_model("moe").save_pretrained(folder)
    return folder


def command(model: Path, rollouts_file: Path, output: Path, *options: str) -> list[str]:
    files = ["--model", model, "--rollouts", rollouts_file, "--output", output]
    return [sys.executable, "tools/replay_rollouts.py", *map(str, files), *options]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("objective", "mesh"),
    [("minpro", "tensor=2,expert=2,data=1"), pytest.param("m2po", "context=2", marks=pytest.mark.long)],
)
def test_replay_is_what_transformers_autograd_and_adamw_do(
    model_dir: Path, tmp_path: Path, objective: str, mesh: str
) -> None:
    model = make_model("moe")
    rows = rollouts(model)
    file, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    numbers = {"--learning-rate": LEARNING_RATE, "--weight-decay": WEIGHT_DECAY, "--clip-grad": CLIP_GRAD}
    options = [text for option, number in numbers.items() for text in (option, str(number))]
    options += ["--objective", objective, "--parallel", mesh, "--mini-batch-groups", "3"]
    done = subprocess.run(
        command(model_dir, file, output, *options), cwd=ROOT, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr

    start = saved_tensors(model)
    updates, tokens, weights = expected_replay(model, rows, objective, groups=3)
    found = json.loads((output / "summary.json").read_text())
    assert list(found) == ["updates"]
    assert [update["num_tokens"] for update in found["updates"]] == [update["num_tokens"] for update in updates]
    for name in ("loss", "grad_norm"):
        expected = [update[name] for update in updates]
        # m2po's second loss is a tenth of its terms, under weights that AdamW made of rounded gradients
        assert [update[name] for update in found["updates"]] == pytest.approx(expected, rel=1e-5, abs=2e-6)
    lines = [json.loads(line) for line in (output / "tokens.jsonl").read_text().splitlines()]
    assert len(lines) == len(rows)
    for row, line in enumerate(lines):
        assert line.keys() == tokens[row].keys()
        for name, values in tokens[row].items():
            np.testing.assert_allclose(line[name], values, rtol=2e-5, atol=2e-5, err_msg=f"row {row}: {name}")
    check_weights(output / "model", weights, start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def check_weights(folder: Path, expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == expected.keys()
    difference = sum(float((saved[name] - expected[name]).norm() ** 2) for name in saved) ** 0.5
    change = sum(float((expected[name] - start[name]).norm() ** 2) for name in saved) ** 0.5
    assert difference <= 1e-3 * change
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.long
def test_weights_that_hold_nan_end_the_replay_with_one_line(model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    row = {"group": "a", "prompt_ids": [1], "response_ids": [2, 3], "behavior_log_probs": [-1, -1], "reward": 0}
    file = write_rows(tmp_path / "rows.jsonl", [row])
    done = subprocess.run(
        command(broken, file, tmp_path / "out", "--objective", "minpro", "--parallel", "data=2"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[:3] == [
        f"checking the rows of {file}",
        "1 rows, 1 updates on 2 ranks (cpu)",
        "starting the ranks",
    ]
    assert lines[-1] == "error: line 1: log_probs[0] = nan under the initial weights: do they hold NaN or infinity?"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "rows.jsonl"]


def test_interrupt_ends_all_ranks_and_leaves_no_output(model_dir: Path, tmp_path: Path) -> None:
    row = {"group": "a", "prompt_ids": [1], "response_ids": [2, 3], "behavior_log_probs": [-1, -1], "reward": 0}
    file = write_rows(tmp_path / "rows.jsonl", [row])
    process = subprocess.Popen(
        command(model_dir, file, tmp_path / "out", "--objective", "minpro", "--parallel", "data=2"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    started: list[psutil.Process] = []
    while len(started) < 3 and time.monotonic() < deadline:  # torchrun and two ranks
        time.sleep(0.1)
        started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert len(started) >= 3
    assert process.returncode == 130, told
    assert "interrupted by SIGTERM" in told
    alive = [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert alive == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
