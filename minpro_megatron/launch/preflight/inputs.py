"""Checks that a run resumes with the data, the model and the hooks of its first start, by content and not by name."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from minpro_megatron.checkpoints.manifest import read_manifest
from minpro_megatron.checkpoints.resume_point import read_latest
from minpro_megatron.config.hooked import hooks_of
from minpro_megatron.config.run import RunConfig
from minpro_megatron.launch.roles import roles_of
from minpro_megatron.models.text_files import text_files
from minpro_megatron.run_folder.run_inputs import InputChange, RunInputs, read_inputs, write_inputs

# In the name of a hook's file, such as `loss.advantage = package.module:function`, and in no other name.
HOOK_SIGN = " = "


def input_digests(config: RunConfig) -> dict[str, str]:
    """SHA-256 of each file whose content decides what the run computes, by the setting that names it.

    The initial weights are taken from the checksums in the Megatron folder's manifest, without reading them. Raises
    ValueError or OSError for files that cannot be read.
    """
    return dict(_digests(config))


def _digests(config: RunConfig) -> Iterator[tuple[str, str]]:
    roles, hf = roles_of(config), Path(config.model.hf_path)
    if "collect" in roles:
        yield "data.train_file", _of_file(Path(config.data.train_file))
        yield "data.heldout_file", _of_file(Path(config.data.heldout_file))
        for benchmark in config.evaluation.benchmarks:
            yield f"evaluation.benchmarks {benchmark.name}", _of_file(Path(benchmark.file))
    if config.data.demonstrations:
        yield "data.demonstrations", _of_file(Path(config.data.demonstrations))
    for hook in hooks_of(config):
        if (source := hook.source_file()) is not None:
            yield str(hook), _of_file(source)
    for name in text_files(hf):
        yield f"model.hf_path/{name}", _of_file(hf / name)
    if "train" in roles:
        files = read_manifest(config.model.megatron_path).files
        stated = json.dumps({name: record.sha256 for name, record in files.items()}, sort_keys=True)
        yield "model.megatron_path", hashlib.sha256(stated.encode()).hexdigest()


def _of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def input_obstacles(config: RunConfig) -> Iterator[str]:
    """One line if inputs of the run in `config.run_dir` have changed since its last start."""
    try:
        recorded = read_inputs(config.run_dir)
        changed = [] if recorded is None else _changed(recorded.digests, input_digests(config))
    except (ValueError, OSError) as error:
        yield f"name = {config.name}: {error}"
        return
    if changed and not config.data.accept_changed_inputs:
        yield (
            f"name = {config.name}: the content of {', '.join(changed)} is not that with which the run in "
            f"{config.run_dir} was started; restore it, give a new name=..., or set data.accept_changed_inputs=true "
            "(its figures before and after then belong to different data)"
        )


def record_inputs(config: RunConfig, goes_on: bool) -> None:
    """Writes the digests of this start's inputs into the run folder, with the changes since the first start."""
    digests = input_digests(config)
    former = read_inputs(config.run_dir) if goes_on else None
    changes = list(former.changes) if former else []
    if former and (changed := _changed(former.digests, digests)):
        manifest = read_latest(config.run_dir)
        changes.append(InputChange(manifest.policy_version if manifest else 0, changed))
    write_inputs(config.run_dir, RunInputs(digests, changes))


def _changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """The names whose digests differ. Older versions did not record the files of hooks: those are not changes."""
    names = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    return sorted(name for name in names if name in before or HOOK_SIGN not in name)
