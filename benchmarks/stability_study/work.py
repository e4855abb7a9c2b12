"""Runs of the study, one process each, several at a time; a finished run has its stored file and is not repeated."""

import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.stability_study.analysis import final_accuracy, peak_accuracy
from benchmarks.stability_study.curves import StoredRun, read_stored
from benchmarks.stability_study.grid import RunKey


def stored_path(results: Path, key: RunKey) -> Path:
    return results / f"{key.name}.jsonl"


def stored(results: Path, keys: Sequence[RunKey], inputs: str | None = None) -> dict[RunKey, StoredRun]:
    """The stored runs among `keys`. Raises ValueError for a run of another model or other prompts than `inputs`, or, if
    that is None, than those of the first run."""
    found = {}
    for key in keys:
        path = stored_path(results, key)
        if path.exists():
            run = found[key] = read_stored(path)
            inputs = inputs or run.inputs
            if run.inputs != inputs:
                raise ValueError(
                    f"{path}: its model and prompts have the fingerprint {run.inputs}, others {inputs}; curves of "
                    "different ones cannot be compared: give another --results"
                )
    return found


def run_missing(
    keys: Sequence[RunKey],
    results: Path,
    runs_dir: Path,
    inputs: str,
    workers: int,
    overrides: Sequence[str] = (),
) -> int:
    """Trains the runs that are not stored yet, in the order of `keys`. Returns the number of failures, which
    are already reported.

    `inputs` is the fingerprint of model and prompts; `overrides` change the recipe's settings, as on a command line.
    """
    todo = [key for key in keys if key not in stored(results, keys, inputs)]
    print(f"{len(keys) - len(todo)} of {len(keys)} runs are there, {len(todo)} to do", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the fork server, which inherits it
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.stability_study.one_run"])
    started, num_ended, num_failed = time.monotonic(), 0, 0
    waiting, running = list(todo), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                key = waiting.pop(0)
                arguments = (key, str(runs_dir), str(stored_path(results, key)), inputs, overrides)
                process: Any = context.Process(target=_worker, args=arguments)
                process.start()
                running[process.sentinel] = (process, key, time.monotonic())
            for sentinel in wait(list(running)):
                process, key, begun = running.pop(sentinel)
                process.join()
                num_ended += 1
                num_failed += process.exitcode != 0
                rate = num_ended / (time.monotonic() - started)
                left = timedelta(seconds=round((len(todo) - num_ended) / rate))
                print(
                    f"[{num_ended}/{len(todo)}] {_outcome(process.exitcode, results, key)}  "
                    f"{time.monotonic() - begun:.0f} s  {rate * 60:.2f} runs/min  left {left}",
                    flush=True,
                )
    finally:
        for process, _, _ in running.values():
            process.kill()
    return num_failed


def _outcome(exit_code: int, results: Path, key: RunKey) -> str:
    if exit_code:
        return f"{key.name}: FAILED with status {exit_code}"
    run = read_stored(stored_path(results, key))
    end = f"  given up: {run.given_up}" if run.given_up else ""
    return f"{key.name}: final {final_accuracy(run):.3f}, peak {peak_accuracy(run):.3f}{end}"


def _end_with_the_study() -> None:
    """Ends this run with the study, because its result would not be used. The parent process is the fork server, which
    lives as long as its runs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _worker(key: RunKey, runs_dir: str, path: str, inputs: str, overrides: Sequence[str]) -> None:
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    from benchmarks.stability_study.one_run import run_and_store  # torch and megatron, which the fork server has

    run_and_store(key, runs_dir, Path(path), inputs, *overrides)
