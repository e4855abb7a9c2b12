"""Weights in Megatron's distributed checkpoint format: saved on one mesh, loaded on any other."""

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from minpro_megatron.monitor.files import check_replaceable, replace_folder
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.architecture import Architecture

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def save_weights(
    chunks: Sequence[GPTModel], architecture: Architecture, path: str | Path, mesh: Mesh, source: str
) -> None:
    """Write the model to the folder `path`. Collective. It appears under its name only when complete; the manifest
    records the architecture and `source`, where the weights came from. Raises ValueError rather than overwrite a folder
    that is no checkpoint."""
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    check_replaceable(path, marker=MANIFEST)
    if mesh.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier(group=mesh.control)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(_sharded_state(chunks, mesh), str(temporary))
    dist.barrier(group=mesh.control)
    if mesh.rank == 0:
        manifest = {"format_version": FORMAT_VERSION, "source": source, "architecture": asdict(architecture)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        replace_folder(temporary, path, marker=MANIFEST)
    dist.barrier(group=mesh.control)


def load_weights(chunks: Sequence[GPTModel], architecture: Architecture, path: str | Path, mesh: Mesh) -> None:
    """Fill the model from the folder `path`, whatever mesh saved it. Collective.

    Raises ValueError if the folder is not a finished checkpoint of this architecture.
    """
    check_manifest(path, architecture)
    state = _sharded_state(chunks, mesh)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        loaded = cast(dict[str, Any], dist_checkpointing.load(state, str(path)))
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"chunk{index}"], strict=True)


def check_manifest(path: str | Path, architecture: Architecture) -> None:
    file = Path(path) / MANIFEST
    if not file.is_file():
        raise ValueError(f"model.megatron_path = {path}: there is no {MANIFEST}; run tools/convert_checkpoint.py first")
    manifest = json.loads(file.read_text())
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file}: format_version = {manifest.get('format_version')}, expected {FORMAT_VERSION}; convert again"
        )
    if "architecture" not in manifest:
        raise ValueError(f"{file}: architecture is missing; convert again")
    wanted = asdict(architecture)
    for field, value in manifest["architecture"].items():
        if wanted.get(field) != value:
            raise ValueError(
                f"{file}: {field} = {value}, but model.hf_path says {wanted.get(field)}; convert that model"
            )


def _sharded_state(chunks: Sequence[GPTModel], mesh: Mesh) -> dict[str, Any]:
    metadata = {"dp_cp_group": mesh.groups.dp_cp}
    return {f"chunk{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
