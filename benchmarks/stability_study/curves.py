"""The curves of a run as one small file, which is committed and from which the report is made."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stability_study.grid import RunKey
from minpro_megatron.evaluation.sampling import FILE_NAME as EVALUATIONS
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.monitor.history import read_history

FORMAT = 1
SIGNIFICANT_DIGITS = 5
RESPONSES = "responses.jsonl"  # of the run folder: a digest of the tokens of each step
# name in the file -> metric
COLUMNS = {
    "accuracy": "reward/accuracy",
    "equal_groups": "reward/equal_groups",
    "entropy": "policy/entropy",
    "clipped": "objective/clipped_fraction",
    "masked": "objective/masked_fraction",
    "loss": "objective/loss",
    "effective_sample_size": "objective/effective_sample_size",
    "ratio_min": "ratio/min",
    "ratio_01": "ratio/quantile_01",
    "ratio_50": "ratio/quantile_50",
    "ratio_99": "ratio/quantile_99",
    "ratio_max": "ratio/max",
    "log_ratio_square": "ratio/log_second_moment",
    "prefix_min_mean": "prefix_min/mean",
    "prefix_min_01": "prefix_min/quantile_01",
    "prefix_min_50": "prefix_min/quantile_50",
    "grad_norm": "optimizer/grad_norm",
    "learning_rate": "optimizer/learning_rate",
    "skipped": "optimizer/skipped_updates",
    "response_tokens": "response/length_mean",
    "truncated": "response/truncated_fraction",
    "staleness": "staleness/mean",
    "mismatch_max": "mismatch/log_prob_abs_max",
}


@dataclass(frozen=True)
class StoredRun:
    """Every column has one value per global step (NaN if the step has none); evaluations are by policy version."""

    key: RunKey
    inputs: str  # fingerprint of model and prompts
    num_steps: int  # planned length of the run
    given_up: str | None  # the trainer's reason
    columns: dict[str, list[float]]
    responses: list[str]  # digests
    versions: list[int]
    heldout: list[float]  # accuracy, by `versions`
    heldout_error: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.responses)


def responses_digest(token_ids: Iterable[np.ndarray]) -> str:
    """8 hexadecimal digits of a step's responses, in canonical order."""
    digest = blake2b(digest_size=4)
    for tokens in token_ids:
        digest.update(len(tokens).to_bytes(4, "little") + tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def append_responses(run_dir: Path, step: int, token_ids: Iterable[np.ndarray]) -> None:
    with (run_dir / RESPONSES).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "digest": responses_digest(token_ids)}) + "\n")


def read_run(run_dir: Path, key: RunKey, inputs: str, num_steps: int, given_up: str | None) -> StoredRun:
    """The results of the run in `run_dir`, rounded as they are stored."""
    steps = [entry.metrics for entry in read_history(run_dir) if entry.is_global_step]
    evaluations = [json.loads(line) for line in (run_dir / EVALUATIONS).read_text().splitlines()]
    digests = [json.loads(line)["digest"] for line in (run_dir / RESPONSES).read_text().splitlines()]
    columns = {name: [_rounded(step.get(metric, math.nan)) for step in steps] for name, metric in COLUMNS.items()}
    return StoredRun(
        key=key,
        inputs=inputs,
        num_steps=num_steps,
        given_up=given_up,
        columns=columns,
        responses=digests[: len(steps)],
        versions=[entry["policy_version"] for entry in evaluations],
        heldout=[_rounded(entry["pass_at_1"]) for entry in evaluations],
        heldout_error=[_rounded(entry["standard_error"]) for entry in evaluations],
    )


def write_stored(path: Path, run: StoredRun) -> None:
    """Writes the file atomically."""
    names = list(run.columns)
    head = {
        "format": FORMAT,
        "run": asdict(run.key),
        "inputs": run.inputs,
        "num_steps": run.num_steps,
        "given_up": run.given_up,
        "heldout": [list(row) for row in zip(run.versions, run.heldout, run.heldout_error, strict=True)],
        "columns": ["responses", *names],
    }
    rows: list[list[Any]] = [
        [digest, *(_or_null(run.columns[name][step]) for name in names)] for step, digest in enumerate(run.responses)
    ]
    lines = [json.dumps(line, allow_nan=False, separators=(",", ":")) for line in [head, *rows]]
    replace_file(path, "\n".join(lines) + "\n")


def read_stored(path: Path) -> StoredRun:
    """Raises ValueError if the file is not of this format."""
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if head.get("format") != FORMAT:
        raise ValueError(f"{path}: format = {head.get('format')!r} instead of {FORMAT}; remove it and run again")
    names = head["columns"][1:]
    evaluations: Sequence[Sequence[float]] = head["heldout"]
    return StoredRun(
        key=RunKey(**head["run"]),
        inputs=head["inputs"],
        num_steps=head["num_steps"],
        given_up=head["given_up"],
        columns={name: [_or_nan(row[1 + place]) for row in rows] for place, name in enumerate(names)},
        responses=[row[0] for row in rows],
        versions=[int(version) for version, _, _ in evaluations],
        heldout=[accuracy for _, accuracy, _ in evaluations],
        heldout_error=[error for _, _, error in evaluations],
    )


def _rounded(number: float) -> float:
    return float(f"{number:.{SIGNIFICANT_DIGITS}g}")


def _or_null(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else float(number)
