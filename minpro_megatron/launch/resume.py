"""Whether the run in a run folder can resume with given settings."""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_file import FILE_NAME as JOURNAL_FILE
from minpro_megatron.buffer.journal_file import has_locks
from minpro_megatron.buffer.journal_reader import JournalReader
from minpro_megatron.checkpoints.manifest import RunManifest
from minpro_megatron.checkpoints.resume_point import CHECKPOINTS, LATEST, newest_complete, read_latest
from minpro_megatron.config.listing import path_settings
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.launch.preflight.inputs import input_obstacles
from minpro_megatron.launch.starts import STARTS
from minpro_megatron.monitor.history import FILE_NAME as HISTORY_FILE
from minpro_megatron.monitor.summary import FILE_NAME as SUMMARY_FILE
from minpro_megatron.monitor.summary import RunSummary, read_summary
from minpro_megatron.run_folder.run_inputs import FILE_NAME as INPUTS_FILE
from minpro_megatron.run_folder.run_inputs import read_inputs

CONFIG_FILE = "run.json"
LOCK_FILE = "launch.lock"
# The files and folders that a start creates before it writes the settings.
BEFORE_SETTINGS = (LOCK_FILE, STARTS)
# The settings that may change between two incarnations: where and how the run computes, how long, and what it keeps.
# Any other change would make its second half a different experiment.
_MAY_CHANGE = (
    "name", "runs_dir", "num_global_steps", "device", "model.recompute", "model.recompute_modules",
    "model.recompute_layers", "model.backend", "model.attention_backend", "optimizer.cpu_offload",
    "parallel", "server", "publish", "checkpoint", "batch.max_tokens_per_row", "batch.packing", "collector.host",
    "collector.port", "collector.journal_keep_steps", "collector.journal_keep_routes", "reward.timeout_s",
    "reward.workers", "reward.urls", "reward.concurrency", "reward.attempt_timeout_s", "reward.deadline_s",
    "data.accept_changed_inputs", "debug.hang_timeout_s", "debug.trace_steps", "debug.profile_steps",
    "debug.profile_ranks", "alarms", "wandb",
)  # fmt: skip


def holds_a_run(run_dir: Path) -> bool:
    """Whether the folder contains a run: its journal has rollouts, which that of a run that failed during its start
    does not have. A run that trains on another run's journal has steps instead, and without a journal there may still
    be checkpoints."""
    journal, history = run_dir / JOURNAL_FILE, run_dir / HISTORY_FILE
    if (run_dir / CHECKPOINTS / LATEST).exists():
        return True
    if not journal.exists():
        return history.exists() and history.stat().st_size > 0
    if not has_locks(run_dir):  # the journal may be in use: this process reads a copy
        try:
            with JournalReader(journal) as reader:
                return bool(reader.rows(limit=1))
        except JournalError:
            return True
    try:
        with closing(sqlite3.connect(f"{journal.absolute().as_uri()}?mode=rw", uri=True, timeout=0.1)) as database:
            return database.execute("SELECT EXISTS (SELECT 1 FROM groups)").fetchone()[0] == 1
    except (sqlite3.Error, UnicodeDecodeError):
        return True  # in use, or damaged: in both cases it must not be removed


def foreign_entries(run_dir: Path) -> list[str]:
    """The entries of a folder without a run that a failed start did not leave: only the user may remove them. A start
    first writes the settings, and without rollouts there is no checkpoint."""
    if not run_dir.is_dir():
        return []
    if _is_readable(run_dir / CONFIG_FILE):
        return [CHECKPOINTS] if any((run_dir / CHECKPOINTS).glob("*")) else []
    before_settings = (*BEFORE_SETTINGS, *([INPUTS_FILE] if _has_inputs(run_dir) else []))
    return sorted(path.name for path in run_dir.iterdir() if path.name not in before_settings)


def _has_inputs(run_dir: Path) -> bool:
    """Whether a start has written its inputs, which precede the settings; other programs may have files with this
    name."""
    try:
        return read_inputs(run_dir) is not None
    except UserError:
        return False


def obstacles(config: RunConfig) -> Iterator[str]:
    """One line for each reason why the run in `config.run_dir` cannot resume with `config`."""
    run_dir, field = config.run_dir, f"name = {config.name}"
    try:
        started_with = RunConfig.from_json((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        yield f"{field}: {run_dir} holds a run of unknown settings ({CONFIG_FILE} cannot be read); give a new name=..."
        return
    changed = list(
        _differences(started_with.model_dump(), config.model_dump(), _MAY_CHANGE + _paths_by_content(run_dir))
    )
    if changed:
        shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        yield f"{field}: {run_dir} holds a run with other settings ({shown}); give a new name=..., or the same settings"
        return
    try:
        summary = read_summary(run_dir)
    except ValueError:
        yield (
            f"{field}: {run_dir / SUMMARY_FILE} is not a summary of this version; remove it to finish the run again "
            "from its last checkpoint, or give a new name=..."
        )
        return
    if summary is not None and summary.steps >= config.num_global_steps:
        yield from _shorter(config, summary.steps)
        return  # finished: nothing else is needed
    if config.debug.trainer == "timer":  # a timer writes no checkpoints, and its times are those of one start
        yield (
            f"{field}: debug.trainer = timer: {run_dir} contains a measurement, which cannot be resumed; give a "
            f"new name=... (its rollouts are in {run_dir / JOURNAL_FILE}), or remove the folder"
        )
        return
    yield from input_obstacles(config)
    try:
        latest = read_latest(run_dir)
    except UserError as error:
        yield f"{field}: {error}"
        return
    if latest is None and (newest := newest_complete(run_dir / CHECKPOINTS)):
        yield (
            f"{field}: {run_dir / CHECKPOINTS / LATEST} is missing, and without it the run would start from its "
            f"beginning; write {newest.folder_name}, the newest complete checkpoint, into it to continue from "
            "there, or give a new name=..."
        )
    if latest is not None:
        yield from _wrong_length(config, started_with.num_global_steps, latest)


def finished_summary(config: RunConfig) -> RunSummary | None:
    """The summary of the run in `config.run_dir` if it has finished with these settings, including the number of global
    steps; else None."""
    try:
        summary = read_summary(config.run_dir)
    except (OSError, ValueError):
        return None  # preflight reports it
    if summary is None or summary.steps != config.num_global_steps or any(obstacles(config)):
        return None
    return summary


def _shorter(config: RunConfig, steps: int) -> Iterator[str]:
    """The reason why a run that has finished `steps` global steps cannot be launched with fewer."""
    if steps > config.num_global_steps:
        yield (
            f"num_global_steps = {config.num_global_steps}: the run in {config.run_dir} has finished its {steps} "
            f"global steps; give {steps} to report its end again, or more to continue it"
        )


def _is_readable(config_file: Path) -> bool:
    try:
        RunConfig.from_json(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _wrong_length(config: RunConfig, steps_before: int, latest: RunManifest) -> Iterator[str]:
    """The reason why a run planned with `steps_before` global steps cannot resume from `latest` to num_global_steps."""
    steps, delay, version = config.num_global_steps, config.staleness.delay_steps, latest.policy_version
    if version > steps:
        yield (
            f"num_global_steps = {steps}: the run in {config.run_dir} resumes from its checkpoint after global step "
            f"{version}; raise it"
        )
    # A checkpoint that records its run's number of steps needs no check: the collector samples the missing groups.
    if not config.samples_responses or latest.num_global_steps is not None:
        return
    if config.staleness.mode == "delay" and steps > steps_before and version > steps_before - delay:
        yield (
            f"num_global_steps = {steps}: the run in {config.run_dir} was to end after step {steps_before}, so the "
            f"versions after {steps_before - delay - 1} sampled nothing for later steps (staleness.delay_steps = "
            f"{delay}), and its checkpoint is of version {version}; write the name of one of version "
            f"{steps_before - delay} or before into {config.run_dir / 'checkpoints' / 'latest'}, or give a new name=..."
        )


def _paths_by_content(run_dir: Path) -> tuple[str, ...]:
    """The settings of paths that may change, because the run folder records the contents of the files."""
    inputs = tuple(setting for setting, path in path_settings().items() if path.is_input)
    return inputs if (run_dir / INPUTS_FILE).exists() else ()


def _differences(before: Any, after: Any, may_change: tuple[str, ...], path: str = "") -> Iterator[str]:
    if path in may_change:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            yield from _differences(before.get(key), after.get(key), may_change, f"{path}.{key}" if path else key)
    elif _are_sections(before) and _are_sections(after) and len(before) == len(after):
        for one, other in zip(before, after, strict=True):
            yield from _differences(one, other, may_change, path)
    elif before != after:
        yield f"{path}: {json.dumps(before)} -> {json.dumps(after)}"


def _are_sections(value: Any) -> bool:
    """Whether the value is a list of sections, such as evaluation.benchmarks."""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
