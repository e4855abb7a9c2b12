"""Reads a run's checkpoint (`run_dir/checkpoints/step-N`) as weights. The trainer wrote it, so it also contains the
optimizer's state, and its manifest is that of a run instead of that of a converted model.

Config, tokenizer and the names of the weight files are those of the run's initial model, which its settings name. A
Hugging Face folder that was exported from a checkpoint records this in a file, for runs that start from both.
"""

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from minpro_megatron.checkpoints.manifest import RunManifest, read_manifest
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file

RUN_SETTINGS = "run.json"
EXPORTED_FROM = "exported_from.json"


class ExportedFrom(msgspec.Struct, frozen=True, kw_only=True):
    """The checkpoint that a Hugging Face folder was exported from. `files_digest` is equal for equal files in any
    folder."""

    checkpoint: str
    policy_version: int
    files_digest: str


def texts_of_run(folder: Path) -> Path:
    """The Hugging Face folder of the initial model of the checkpoint's run. Raises UserError if the run's settings are
    not in its folder, or if the Hugging Face folder does not exist."""
    settings = folder.absolute().parent.parent / RUN_SETTINGS
    remedy = "give --hf-reference, a folder with config and tokenizer"
    try:
        config = RunConfig.from_json(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not settings of this version
        raise UserError(
            f"{settings}: the settings of the checkpoint's run cannot be read ({error}); {remedy}"
        ) from None
    texts = Path(config.model.hf_path)
    if not (texts / "config.json").is_file():
        raise UserError(f"{settings}: model.hf_path = {texts}: there is no config.json here; {remedy}")
    return texts


def write_exported_from(output: Path, checkpoint: Path) -> str:
    """Records in `output` what it was exported from. Returns the file's name."""
    manifest = read_manifest(checkpoint)
    assert isinstance(manifest, RunManifest), checkpoint
    stated = ExportedFrom(
        checkpoint=str(checkpoint.absolute()),
        policy_version=manifest.policy_version,
        files_digest=_digest(manifest),
    )
    text = msgspec.json.format(msgspec.json.encode(stated), indent=2).decode()
    replace_file(output / EXPORTED_FROM, text + "\n")
    return EXPORTED_FROM


def is_exported_from(hf_path: Path, checkpoint: Path) -> bool:
    """Whether the Hugging Face folder was exported from this checkpoint, according to its record."""
    try:
        stated = msgspec.json.decode((hf_path / EXPORTED_FROM).read_bytes(), type=ExportedFrom)
    except (OSError, msgspec.DecodeError):
        return False
    manifest = read_manifest(checkpoint)
    return isinstance(manifest, RunManifest) and stated.files_digest == _digest(manifest)


def _digest(manifest: RunManifest) -> str:
    """The digest of the files, not of the manifest, to which a score is added later."""
    lines: list[Any] = [f"{name} {file.sha256}\n" for name, file in sorted(manifest.files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
