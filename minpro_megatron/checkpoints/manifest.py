"""The manifest of a folder of Megatron weights: what the weights are, and the checksum of every other file in it.

It is written last, so a folder with a manifest is complete. A converted model has a `ModelManifest`; a checkpoint of a
run, which also holds the optimizer's state, has a `RunManifest`. Both have what a reader of the weights needs:
`source`, `dtype`, `architecture` and `files`.
"""

import hashlib
import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.models.architecture import Architecture

MANIFEST = "manifest.json"
METADATA = ".metadata"  # of torch's distributed checkpoints
HF_TEXTS = "hf"  # config, tokenizer and index of the model that converted weights came from
FormatVersion = Literal[2]
WeightDtype = Literal["float32", "bfloat16"]
_DIGEST = "digest"
_ONLY_OF_RUNS = "policy_version"


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One file as it was written."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: str


# The files of a folder by path relative to it: all except the manifest.
Files = dict[str, FileRecord]


class ModelManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The manifest of a converted model."""

    format_version: FormatVersion = 2
    source: str  # the name of the folder that the weights came from
    dtype: WeightDtype
    architecture: Architecture
    files: Files


class RunIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """The run that wrote the checkpoint, with settings as JSON values. Seed and architecture must be equal in the run
    that loads it; the other fields are information."""

    seed: int
    objective: str
    dtype: WeightDtype
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
    """The manifest of a run's checkpoint."""

    format_version: FormatVersion = 2
    run: RunIdentity
    created: datetime
    score: float | None = None  # from the evaluation of policy_version, once known
    files: Files

    @property
    def folder_name(self) -> str:
        return folder_name(self.policy_version)

    @property
    def source(self) -> str:
        return self.folder_name

    @property
    def dtype(self) -> WeightDtype:
        return self.run.dtype

    @property
    def architecture(self) -> Architecture:
        """Raises UserError if the run's architecture is not one of this version."""
        try:
            return msgspec.convert(self.run.architecture, Architecture)
        except msgspec.ValidationError as error:
            raise UserError(f"run.architecture: {error}") from None


Manifest = ModelManifest | RunManifest


def folder_name(policy_version: int) -> str:
    """The name of the folder of a run's checkpoint.

    >>> folder_name(10)
    'step-000010'
    """
    return f"step-{policy_version:06d}"


def to_json(manifest: Manifest) -> str:
    """The manifest as JSON with a digest of its content, which is the only way to detect a damaged number in it."""
    content = msgspec.to_builtins(manifest)
    return json.dumps({_DIGEST: _digest(content), **content}, indent=2) + "\n"


def from_json(text: bytes) -> Manifest:
    """The manifest in a file. Raises UserError if it is damaged or not a manifest of this version."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise UserError("a manifest must be a JSON object")
        digest = content.pop(_DIGEST, None)  # earlier versions did not write one
        kind: type[Manifest] = RunManifest if _ONLY_OF_RUNS in content else ModelManifest
        manifest = msgspec.convert(content, kind)
    except (ValueError, msgspec.ValidationError) as error:  # ValueError: not JSON, or not text
        raise UserError(str(error)) from None
    if digest is not None and digest != _digest(content):
        raise UserError("its content does not match its digest, so it is damaged")
    return manifest


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    replace_file(folder / MANIFEST, to_json(manifest))


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the folder, which is a converted model or a run's checkpoint. Raises UserError if there is none,
    or it is not a complete manifest of this version."""
    file = Path(folder) / MANIFEST
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{folder}: there is no {MANIFEST}, so this is not a complete Megatron checkpoint; run `minpro convert`"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    of_run = is_run_checkpoint(file.parent)
    try:
        manifest = from_json(text)
        manifest.architecture  # noqa: B018 (that of a run is checked when it is read)
    except UserError as error:
        remedy = "use the version of this project that wrote it" if of_run else "convert again"
        raise UserError(f"{file}: {error}; {remedy}") from None
    return manifest


def is_run_checkpoint(folder: Path) -> bool:
    """Whether the folder's manifest is that of a run's checkpoint."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and _ONLY_OF_RUNS in content


def check_architecture(folder: str | Path, manifest: Manifest, architecture: Architecture) -> None:
    """Raises ValueError that names the first size in which the weights differ from `architecture`."""
    wanted = asdict(architecture)
    for field, value in asdict(manifest.architecture).items():
        if wanted[field] != value:
            raise UserError(
                f"{Path(folder) / MANIFEST}: {field} = {value}, but the Hugging Face config.json says {wanted[field]}; "
                "convert that model"
            )
