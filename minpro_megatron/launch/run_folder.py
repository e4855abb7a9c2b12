"""Prepares the run folder before a start, once for all roles."""

import errno
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minpro_megatron.buffer.staleness import beginning_after
from minpro_megatron.checkpoints.manifest import RunManifest
from minpro_megatron.checkpoints.resume_point import read_latest
from minpro_megatron.config.model import layer_backend_of
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.launch.preflight.inputs import record_inputs
from minpro_megatron.launch.resume import CONFIG_FILE, LOCK_FILE, holds_a_run
from minpro_megatron.run_folder.start_fence import former_start_at_work, take_over
from minpro_megatron.serving.api_key import make_api_key

# Files in which an earlier incarnation describes its state: they would mislead this one's roles and display.
_OF_ONE_INCARNATION = ("endpoints", "memory", "report.html", "status", "summary.json")
# Further files that a run which failed during its start may have left.
_LEFTOVERS = (
    "alarms.jsonl", "checkpoints", "environment.json", "evaluations.jsonl", "journal.sqlite", "journal.sqlite-shm",
    "journal.sqlite-wal", "logs", "metrics.jsonl", "profiles", "published", "routes", "samples.jsonl",
    "tensorboard", "trace", "trace.json", "wandb", "wandb_run_id",
)  # fmt: skip
# For the processes of an older start on another machine, which check for a newer one every second.
TAKE_OVER_S = 5.0
_LOCK_IS_HELD = (errno.EAGAIN, errno.EACCES)


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Locks the run folder against a second launcher. The lock ends with this process, however it ends.

    On a file system without locks (as some parallel ones are mounted) the run works too: there the newer of two starts
    ends the older one (run_folder/start_fence.py)."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _LOCK_IS_HELD:
                raise UserError(
                    f"name = {run_dir.name}: another launch is using {run_dir}; choose another name=..."
                ) from None
        yield


def prepare(config: RunConfig, incarnation: int, say: Callable[[str], None] = print) -> tuple[Path, bool]:
    """Takes the run folder over for this start, removes the state files of earlier incarnations and writes the
    settings. Returns the settings file, and whether a run is resumed."""
    run_dir = config.run_dir
    take_over(run_dir, incarnation)
    if former := former_start_at_work(run_dir, incarnation):
        number, owner = former
        say(
            f"start {number + 1} of the run (on {owner.host}) does not seem to have ended: "
            f"{TAKE_OVER_S:.0f} s for its processes to detect that this start takes over"
        )
        time.sleep(TAKE_OVER_S)
    goes_on = holds_a_run(run_dir)
    _remove(run_dir, _OF_ONE_INCARNATION if goes_on else _OF_ONE_INCARNATION + _LEFTOVERS)
    config_file = run_dir.absolute() / CONFIG_FILE
    record_inputs(config, goes_on)  # before the settings: a folder with settings has both
    replace_file(config_file, config.to_json())
    make_api_key(config)  # after the settings, by which a later start knows the folder as one of this program
    return config_file, goes_on


def first_lines(config: RunConfig, incarnation: int, goes_on: bool) -> list[str]:
    """The first output of a start: the run, and the point from which it resumes."""
    lines = [
        f"run {config.name}: {config.objective.name}, {config.num_global_steps} global steps; files in {config.run_dir}"
    ]
    if config.device == "cuda" and config.debug.trainer == "megatron":
        names = {"transformer_engine": "Transformer Engine", "torch": "torch"}
        chosen = names[layer_backend_of(config.model.backend, config.device, config.model.dtype)]
        lines.append(f"layers computed by {chosen} (model.backend = {config.model.backend})")
    if goes_on:
        manifest = read_latest(config.run_dir)
        where = f"from its checkpoint after global step {manifest.policy_version}" if manifest else "from its beginning"
        lines.append(f"it resumes {where} (start {incarnation + 1} of this run)")
        if manifest is not None and config.staleness.mode == "delay" and config.samples_responses:
            lines += _longer_run_lines(config, manifest)
    return lines


def _longer_run_lines(config: RunConfig, manifest: RunManifest) -> list[str]:
    """The changes for a run that is extended in delay mode; [] for any other run."""
    version, delay, steps = manifest.policy_version, config.staleness.delay_steps, config.num_global_steps
    added = beginning_after(manifest.num_global_steps, version, steps, delay)
    if added is None:
        return []
    until = min(version + delay, steps) - 1
    batches = f"batch {until}" if added.first_batch == until else f"batches {added.first_batch} to {until}"
    return [
        f"it is extended from {manifest.num_global_steps} to {steps} global steps: the weights that should have "
        f"sampled {batches} no longer exist, so version {version} samples them, and the staleness grows from "
        f"{added.first_batch - version} to {delay} again, as at the start of a run"
    ]


def _remove(run_dir: Path, names: tuple[str, ...]) -> None:
    for name in names:
        path = run_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
