"""Weights in Megatron's distributed checkpoint format: saved on one mesh, loaded on any other."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from minpro_megatron.checkpoints.file_records import record_file, verify_files
from minpro_megatron.checkpoints.manifest import (
    HF_TEXTS,
    FileRecord,
    ModelManifest,
    check_architecture,
    read_manifest,
    write_manifest,
)
from minpro_megatron.checkpoints.sharded_files import refuse_code
from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import LIST_OF_FILES, begin_folder, check_replaceable, finish_folder
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.models.text_files import copy_texts
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.hf_files import dtype_name


def save_weights(
    chunks: Sequence[GPTModel], architecture: Architecture, path: str | Path, mesh: Mesh, hf_path: str | Path
) -> None:
    """Write the model to the folder `path`, with the texts (config, tokenizer) of `hf_path`, the initial model.
    Collective. The folder appears under its name only when complete. Raises ValueError if it would replace files that
    this program did not write."""
    path, hf_path = Path(path), Path(hf_path)
    check_replaceable(path)  # on all ranks, so that all raise
    temporary = mesh.from_rank_0(begin_folder(path) if mesh.rank == 0 else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist_checkpointing.save(_sharded_state(chunks, mesh), str(temporary))
    if mesh.rank == 0:
        (temporary / HF_TEXTS).mkdir()
        copy_texts(hf_path, temporary / HF_TEXTS)
    dist.barrier(group=mesh.control)
    records = mesh.from_all_ranks(_records(temporary, mesh))
    if mesh.rank == 0:
        manifest = ModelManifest(
            source=hf_path.resolve().name,
            dtype=dtype_name(next(chunks[0].parameters()).dtype),  # type: ignore[arg-type]  one of the two
            architecture=architecture,
            files={name: record for found in records for name, record in sorted(found.items())},
        )
        write_manifest(temporary, manifest)
        finish_folder(temporary, path)
    dist.barrier(group=mesh.control)


def _records(folder: Path, mesh: Mesh) -> dict[str, FileRecord]:
    """The files that this rank wrote; on rank 0 also those written for all ranks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LIST_OF_FILES]
    own = [path for path in files if path.name.startswith(f"__{mesh.rank}_")]
    common = [path for path in files if not path.name.startswith("__")] if mesh.rank == 0 else []
    return {str(path.relative_to(folder)): record_file(path) for path in own + common}


def load_weights(chunks: Sequence[GPTModel], architecture: Architecture, path: str | Path, mesh: Mesh) -> None:
    """Load the model from the folder `path`, which any mesh or tool may have written. Collective.

    Raises ValueError if the folder is not a complete, undamaged checkpoint of this architecture.
    """
    manifest = read_manifest(path)
    check_architecture(path, manifest, architecture)
    verify_files(path, manifest)
    refuse_code_on_all_ranks(
        Path(path), mesh
    )  # before Megatron's loader, which unpickles the same files without a list of allowed classes
    state = _sharded_state(chunks, mesh)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        loaded = cast(dict[str, Any], dist_checkpointing.load(state, str(path)))
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"chunk{index}"], strict=True)


def refuse_code_on_all_ranks(path: Path, mesh: Mesh) -> None:
    """Raises ValueError on all ranks if the folder's pickles contain more than data. Only rank 0 reads the objects: a
    large model has thousands of them."""
    problem = ""
    if mesh.rank == 0:
        try:
            refuse_code(path)
        except UserError as error:
            problem = str(error)
    if problem := mesh.from_rank_0(problem):
        raise UserError(problem)


def _sharded_state(chunks: Sequence[GPTModel], mesh: Mesh) -> dict[str, Any]:
    metadata = {"dp_cp_group": mesh.groups.dp_cp}
    return {f"chunk{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
