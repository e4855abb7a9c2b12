"""Runs what the record lacks, one run at a time; several processes may work at one record.

A process claims a run by a lock that ends with the process, so one that was killed leaves nothing to clean up.
"""

import fcntl
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.stability_study.grid import (
    OBJECTIVES,
    chosen_rate,
    means_by_rate,
    next_rates,
    selection_keys,
    study_keys,
)
from benchmarks.stability_study.record import StoredTrial, append, primary_metric, read_record, stored_trial
from benchmarks.stability_study.trial import Trial, TrialKey, TrialSettings, objective_section
from benchmarks.stability_study.warm_start import digest

type Record = Mapping[TrialKey, StoredTrial]


def setup_digest(initial: Mapping[str, Tensor], settings: TrialSettings) -> str:
    """Of what all runs of a record have in common, and of every objective's settings. Runs with different ones cannot
    be compared."""
    objectives = {name: objective_section(name).model_dump(mode="json") for name in OBJECTIVES}
    text = json.dumps([asdict(settings), objectives], sort_keys=True) + digest(initial)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def machine() -> str:
    """What decides the last bits of a sum beside the program: torch, and the instructions that its kernels use."""
    return f"torch {torch.__version__}, {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def selection_means(record: Record, objective: str) -> dict[float, float]:
    """The primary metric by learning rate, of those rates of an objective whose selection runs are all there."""
    found = {
        key: primary_metric(trial)
        for key, trial in record.items()
        if key.stage == "selection" and key.objective == objective
    }
    return means_by_rate(found)


def chosen_rates(record: Record) -> dict[str, float]:
    """The learning rate of each objective whose selection is complete."""
    means = {objective: selection_means(record, objective) for objective in OBJECTIVES}
    return {objective: chosen_rate(found) for objective, found in means.items() if not next_rates(found)}


def missing_keys(record: Record) -> list[TrialKey]:
    """The runs that the record lacks and that can be known yet, in order: the selection's, then the study's, which need
    every objective's rate. Raises ValueError for a run that is none of the study's: the same objective, delay and seed
    with another rate would replace the right one unseen."""
    selection = [
        key
        for objective in OBJECTIVES
        for key in selection_keys(objective, next_rates(selection_means(record, objective)))
    ]
    rates = chosen_rates(record)
    study = study_keys(rates) if len(rates) == len(OBJECTIVES) else []
    if others := {key for key in record if key.stage != "selection"} - set(study):
        chosen = f"which has the rates {', '.join(f'{name} {rate:g}' for name, rate in rates.items())}"
        raise ValueError(
            f"{min(others).name} is no run of the study, {chosen if study else 'whose rates are not all chosen'}; "
            f"remove its line from the record ({len(others)} such lines)"
        )
    return [key for key in (*selection, *study) if key not in record]


@contextmanager
def claimed(folder: Path, key: TrialKey) -> Iterator[bool]:
    """Whether this process may do the run: no other one does at the moment."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key.name.replace(' ', '-')}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def run_missing(path: Path, initial: Mapping[str, Tensor], settings: TrialSettings, say: Callable[[str], None]) -> None:
    """Does runs until the record at `path` is complete or other processes have claimed the rest. Raises ValueError if
    it has runs of another setup, with which new ones could not be compared."""
    if others := {trial.setup for trial in read_record(path).values()} - {setup_digest(initial, settings)}:
        raise ValueError(
            f"{path} has runs of another setup, {', '.join(sorted(others))}, than today's, "
            f"{setup_digest(initial, settings)}; go on with its own program, or begin another record with --record"
        )
    claims, times = path.with_name(f"{path.stem}_claims"), path.with_name(f"{path.stem}_times.jsonl")
    started, done = time.monotonic(), 0
    while key := _next_claimed(path, claims, initial, settings, times):
        done += 1
        record = read_record(path)
        left = len(missing_keys(record))
        rate = done / (time.monotonic() - started)
        say(
            f"{key.name}: {primary_metric(record[key]):.3f}; {len(record)} runs in the record, {left} known to be "
            f"missing, {3600 * rate:.1f} runs/h, {timedelta(seconds=round(left / rate))} left"
        )


def repeated(trial: StoredTrial, initial: Mapping[str, Tensor], settings: TrialSettings) -> StoredTrial:
    """The run once more. Raises ValueError if it was made with other settings or initial weights."""
    if trial.setup != setup_digest(initial, settings):
        raise ValueError(f"{trial.key.name}: its setup {trial.setup} is not today's, {setup_digest(initial, settings)}")
    return _done(trial.key, initial, settings)


def _done(key: TrialKey, initial: Mapping[str, Tensor], settings: TrialSettings) -> StoredTrial:
    result = Trial(key, initial, settings).run()
    return stored_trial(key, result, settings, setup_digest(initial, settings), machine())


def _next_claimed(
    path: Path, claims: Path, initial: Mapping[str, Tensor], settings: TrialSettings, times: Path
) -> TrialKey | None:
    """Does the first missing run that no other process does, and returns its key; None if there is none."""
    for key in missing_keys(read_record(path)):
        with claimed(claims, key) as mine:
            if mine and key not in read_record(path):
                wall, processor = time.monotonic(), time.process_time()
                append(path, _done(key, initial, settings))
                spent = {"wall_s": round(time.monotonic() - wall, 1)}
                spent["processor_s"] = round(time.process_time() - processor, 1)
                with times.open("a") as file:
                    file.write(json.dumps({"run": key.name, **spent}) + "\n")
                return key
    return None
