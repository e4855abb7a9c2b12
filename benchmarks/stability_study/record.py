"""The record: one JSON line for each run, in results.jsonl. Two records merge if they agree on the runs of both."""

import fcntl
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.stability_study.measures import last_third
from benchmarks.stability_study.trial import TrialKey, TrialResult, TrialSettings
from minpro_megatron.buffer.staleness import evaluated_versions

DIGITS = 6  # significant digits of statistics
BIN = 5  # global steps whose statistics are averaged to one number


@dataclass(frozen=True)
class StoredTrial:
    """A run of the record."""

    key: TrialKey
    setup: str  # digest of all settings and initial weights: runs that differ in it are not compared
    machine: str
    num_global_steps: int
    evaluate_every: int
    ended_at: int | None  # the global step whose gradient was not finite
    heldout: list[float]  # accuracy of versions 0, evaluate_every, ..., num_global_steps; shorter if the run ended
    series: dict[str, list[float]]  # means over BIN global steps each
    means: dict[str, float]  # over the whole run
    compared: list[dict[str, float]]


def stored_trial(key: TrialKey, result: TrialResult, settings: TrialSettings, setup: str, machine: str) -> StoredTrial:
    """The run with statistics in bins, of positions only their mean over the run, with DIGITS significant digits."""
    names = sorted({name for step in result.steps for name in step})
    curves = [name for name in names if "_by_position/" not in name]
    bins = [result.steps[first : first + BIN] for first in range(0, len(result.steps), BIN)]
    return StoredTrial(
        key=key,
        setup=setup,
        machine=machine,
        num_global_steps=settings.num_global_steps,
        evaluate_every=settings.evaluate_every,
        ended_at=result.ended_at,
        heldout=[_rounded(value) for value in result.heldout],
        series={name: [_mean(name, steps) for steps in bins] for name in curves},
        means={name: _mean(name, result.steps) for name in names if name not in curves},
        compared=[{name: _rounded(value) for name, value in one.items()} for one in result.compared],
    )


def _mean(name: str, steps: Iterable[Mapping[str, float]]) -> float:
    values = [step[name] for step in steps if name in step]
    return _rounded(fmean(values)) if values else math.nan


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def versions(trial: StoredTrial) -> list[int]:
    return evaluated_versions(trial.num_global_steps, trial.evaluate_every)


def heldout_curve(trial: StoredTrial) -> list[float]:
    """The accuracy of every evaluated version; 0 for those that a run without a finite gradient did not reach."""
    return [*trial.heldout, *[0.0] * (len(versions(trial)) - len(trial.heldout))]


def primary_metric(trial: StoredTrial) -> float:
    return last_third(versions(trial), heldout_curve(trial))


def as_line(trial: StoredTrial) -> str:
    return json.dumps(asdict(trial), separators=(",", ":"))


def from_line(line: str) -> StoredTrial:
    fields: dict[str, Any] = json.loads(line)
    fields["key"] = TrialKey(**fields["key"])
    return StoredTrial(**fields)


def read_record(path: Path) -> dict[TrialKey, StoredTrial]:
    """The runs in `path`, none if there is no such file. The last line is left out if a crash cut it off.

    Raises ValueError for a damaged line, and for two different lines of the same run.
    """
    if not path.exists():
        return {}
    found = dict[TrialKey, StoredTrial]()
    *lines, _ = path.read_text().split("\n")
    for number, line in enumerate(lines, 1):
        try:
            trial = from_line(line)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: no run of the study ({error}); restore the file") from None
        if as_line(found.setdefault(trial.key, trial)) != line:
            raise ValueError(f"{path}, line {number}: another result of {trial.key.name}; remove one of them")
    return found


def append(path: Path, trial: StoredTrial) -> None:
    """Adds a run, while no other process does. A line that a crash cut off is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(as_line(trial).encode() + b"\n")


def merge(path: Path, others: Iterable[Path]) -> int:
    """Adds the runs of `others` that `path` has not; returns their number. Of a run that several machines did with the
    same numbers, the first line stays. Raises ValueError as `read_record` does, and if two files disagree on a run;
    then nothing is written."""
    found, new = read_record(path), list[StoredTrial]()
    for other in others:
        if not other.exists():
            raise ValueError(f"{other}: there is no such file")
        for key, trial in read_record(other).items():
            if key not in found:
                found[key] = trial
                new.append(trial)
            elif as_line(replace(trial, machine=(first := found[key]).machine)) != as_line(first):
                raise ValueError(
                    f"{other} and {path}: different results of {key.name}, made with {trial.machine} and "
                    f"{first.machine}; if these are the same, a run should be too: find the cause with 'repeat'; if "
                    f"not, remove the line from {other}, whatever its result is"
                )
    for trial in new:
        append(path, trial)
    return len(new)
