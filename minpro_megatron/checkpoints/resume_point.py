"""The point that a run resumes from: a checkpoint's manifest, and the file `latest` that names the checkpoint.

    run_dir/checkpoints/latest                     "step-000010"
    run_dir/checkpoints/step-000010/manifest.json  written last: a folder with one is complete
    run_dir/checkpoints/step-000010/...            Megatron's distributed checkpoint

The manifest is sufficient: every random number of a run derives from (seed, purpose, step, group or update), so policy
version and updates determine where each stream continues, and no generator's state is saved. The journal stores which
groups are consumed by a version, and which prompt is next.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from minpro_megatron.errors import UserError

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
_DIGEST = "digest"
_FOLDER_NAME = re.compile(r"step-(\d{6,})")


class SavedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file as it was written."""

    bytes: int
    sha256: str


class RunIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """The run that wrote the checkpoint, with settings as JSON values. Seed and architecture must be equal in the run
    that loads it; the other fields are information."""

    seed: int
    objective: str
    dtype: str
    parallel: dict[str, Any]  # the mesh that saved it; any mesh can load it
    architecture: dict[str, Any]


class TrainerState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of the trainer between two global steps."""

    policy_version: int  # completed global steps
    updates: int  # optimizer updates so far; their seeds derive from it
    # the updates that did not change the optimizer (no trained token, or a gradient that is not finite); None in
    # checkpoints of earlier versions
    skipped_updates: int | None = None
    # the run's length when this was saved: no later batch was sampled; None in checkpoints of earlier versions
    num_global_steps: int | None = None


class RunManifest(TrainerState, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format_version: Literal[2] = 2
    run: RunIdentity
    created: datetime
    score: float | None = None  # from the evaluation of policy_version, once known
    files: dict[str, SavedFile]  # by name; all files except the manifest

    @property
    def folder_name(self) -> str:
        return folder_name(self.policy_version)


def folder_name(policy_version: int) -> str:
    return f"step-{policy_version:06d}"


def version_of(name: str) -> int | None:
    """The policy version of a checkpoint's folder name; None for any other name."""
    match = _FOLDER_NAME.fullmatch(name)
    return int(match[1]) if match and folder_name(int(match[1])) == name else None


def to_json(manifest: RunManifest) -> str:
    """The manifest as JSON with a digest of its content, which is the only way to detect a damaged number in it."""
    content = msgspec.to_builtins(manifest)
    return json.dumps({_DIGEST: _digest(content), **content}, indent=2) + "\n"


def from_json(text: bytes) -> RunManifest:
    """The manifest in a file. Raises UserError if it is damaged or not a manifest of this version."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise UserError("a manifest must be a JSON object")
        digest = content.pop(_DIGEST, None)  # earlier versions did not write one
        manifest = msgspec.convert(content, RunManifest)
    except (ValueError, msgspec.ValidationError) as error:  # ValueError: not JSON, or not text
        raise UserError(str(error)) from None
    if digest is not None and digest != _digest(content):
        raise UserError("its content does not match its digest, so it is damaged")
    return manifest


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def read_manifest(folder: Path) -> RunManifest:
    """Raises UserError if the folder has no manifest of this version."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, so the checkpoint is not complete") from None
    try:
        manifest = from_json(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
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
    manifest = read_manifest(folder)
    for name, record in manifest.files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != record.bytes:
            what = "no such file" if found is None else f"{found} bytes"
            raise UserError(f"{path}: {what}, but {MANIFEST} says {record.bytes} bytes")
    return manifest
