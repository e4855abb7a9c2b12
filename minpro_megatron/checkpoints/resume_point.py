"""The point that a run resumes from: a checkpoint's manifest, and the file `latest` that names the checkpoint.

    run_dir/checkpoints/latest                     "step-000010"
    run_dir/checkpoints/step-000010/manifest.json  written last: a folder with one is complete
    run_dir/checkpoints/step-000010/...            Megatron's distributed checkpoint

The manifest is sufficient: every random number of a run derives from (seed, purpose, step, group or update), so policy
version and updates determine where each stream continues, and no generator's state is saved. The journal stores which
groups are consumed by a version, and which prompt is next.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minpro_megatron.checkpoints.manifest import MANIFEST, RunIdentity, RunManifest, folder_name, from_json
from minpro_megatron.errors import UserError

CHECKPOINTS = "checkpoints"
LATEST = "latest"
_FOLDER_NAME = re.compile(r"step-(\d{6,})")


def version_of(name: str) -> int | None:
    """The policy version of a checkpoint's folder name; None for any other name."""
    match = _FOLDER_NAME.fullmatch(name)
    return int(match[1]) if match and folder_name(int(match[1])) == name else None


def read_latest(run_dir: Path | str) -> RunManifest | None:
    """The manifest of the checkpoint that the run resumes from; None if the run has no checkpoint yet.

    Raises UserError, which names the newest complete checkpoint, if the checkpoint is missing or damaged. This checks
    its manifest and the sizes of its files. The ranks that load the files check their bytes, each rank a share of them
    (checkpoints/run_checkpoints.py).
    """
    return read_latest_in(Path(run_dir) / CHECKPOINTS)


def read_latest_in(checkpoints: Path) -> RunManifest | None:
    """`read_latest` for the folder of the checkpoints."""
    latest = checkpoints / LATEST
    if not latest.exists():
        return None
    try:
        return _read_whole(checkpoints / _named_by(latest))
    except UserError as error:
        newest = newest_complete(checkpoints)
        remedy = (
            f"{newest.folder_name} is complete: write this name into {latest} to resume from it"
            if newest
            else f"there is no other checkpoint: remove {checkpoints} and the journal, or give another run name"
        )
        raise UserError(f"{error}; {remedy}") from None


def read_run_manifest(folder: Path) -> RunManifest:
    """The manifest of a checkpoint in a run's folder. Raises UserError if there is no manifest of this version, or one
    of another checkpoint."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, so the checkpoint is not complete") from None
    try:
        manifest = from_json(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(manifest, RunManifest):
        raise UserError(f"{path}: this is a converted model, not a checkpoint of a run")
    if manifest.folder_name != folder.name:
        raise UserError(f"{path}: policy_version = {manifest.policy_version} belongs in {manifest.folder_name}")
    return manifest


def complete_manifests(checkpoints: Path) -> Iterator[RunManifest]:
    """The manifests of all complete checkpoints in the folder, in no particular order."""
    for folder in checkpoints.iterdir():
        if version_of(folder.name) is not None:
            try:
                yield _read_whole(folder)
            except UserError:
                continue


def newest_complete(checkpoints: Path) -> RunManifest | None:
    """The manifest of the complete checkpoint of the highest version; None if there is none."""
    if not checkpoints.is_dir():
        return None
    return max(complete_manifests(checkpoints), key=lambda manifest: manifest.policy_version, default=None)


def refuse_other_run(folder: Path, saved: RunIdentity, own: RunIdentity) -> None:
    """Raises UserError if the checkpoint in `folder` cannot continue the run `own`."""
    pairs: list[tuple[str, Any, Any]] = [("seed", saved.seed, own.seed)]
    for field in sorted(saved.architecture.keys() | own.architecture.keys()):
        pairs.append((field, saved.architecture.get(field), own.architecture.get(field)))
    for field, there, here in pairs:
        if there != here:
            raise UserError(
                f"{folder / MANIFEST}: {field} = {there}, but this run has {here}; give the run's previous "
                "settings, or another run name to start a new run"
            )


def _named_by(latest: Path) -> str:
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if version_of(name) is None:
        raise UserError(f"{latest}: {name[:80]!r} is not the name of a checkpoint, such as {folder_name(10)}")
    return name


def _read_whole(folder: Path) -> RunManifest:
    manifest = read_run_manifest(folder)
    for name, record in manifest.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != record.bytes:
            what = "no such file" if found is None else f"{found} bytes"
            raise UserError(f"{path}: {what}, but {MANIFEST} says {record.bytes} bytes")
    return manifest
