"""Runs of a recipe that a benchmark trains once and reads from then on, and the tiny models that they start from."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run_python(*words: object) -> None:
    """Runs python with these arguments in this checkout; ends this process with an error line if that fails."""
    finished = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=False)
    if finished.returncode:
        sys.exit(f"{' '.join(map(str, words))} ended with status {finished.returncode}")


def make_model(task: str, folder: Path) -> Path:
    """The folder of the task's warm-started model; it is made, in both forms, if it is missing."""
    hf, megatron = folder / "hf", folder / "megatron"
    if not (hf / "config.json").exists():
        run_python("tools/make_tiny_model.py", "--task", task, "--output", hf)
    if not (megatron / "manifest.json").exists():
        run_python("tools/convert_checkpoint.py", "to-megatron", "--hf", hf, "--output", megatron)
    return hf


def trained_run(recipe: str, name: str, *settings: str) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """The metrics of each trained global step, and the evaluations. A complete run of this name is not repeated, and an
    interrupted one is resumed."""
    folder = ROOT / "runs" / name
    if not (folder / "summary.json").exists():
        run_python("-m", "minpro_megatron", "launch", recipe, f"name={name}", *settings)
    steps = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return [metrics for metrics in steps if "reward/accuracy" in metrics], evaluations
