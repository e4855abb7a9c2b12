"""Converts checkpoints from Hugging Face's format to Megatron's and back, a few rows of one tensor at a time.

Nothing is computed, and nothing is cast unless a dtype is requested, so both directions are bit-exact. Memory use does
not depend on the model's size: only a piece of one tensor is in memory, and the files that are read are mapped one part
at a time. A result gets its name only when it is complete; the output of a killed conversion has no manifest (or
another name), and no program loads it.
"""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minpro_megatron.checkpoints.file_records import file_records, sha256_lines, verify_files
from minpro_megatron.checkpoints.manifest import (
    HF_TEXTS,
    ModelManifest,
    check_architecture,
    is_run_checkpoint,
    read_manifest,
    write_manifest,
)
from minpro_megatron.checkpoints.run_checkpoint import texts_of_run, write_exported_from
from minpro_megatron.checkpoints.sharded_files import ShardedReader, ShardedWriter, place
from minpro_megatron.errors import UserError
from minpro_megatron.files.disk_space import as_size, existing_parent, free_bytes, naming_full_disk
from minpro_megatron.files.replacement import check_replaceable, new_folder
from minpro_megatron.models.architecture import Architecture, read_architecture
from minpro_megatron.models.model_files import read_json_object
from minpro_megatron.models.text_files import CONFIG, copy_texts, state_dtype
from minpro_megatron.models.weight_files import INDEX, SINGLE_FILE, read_weight_map, shard_names, write_index
from minpro_megatron.weights.hf_files import SHARD_BYTES, HfReader, dtype_name
from minpro_megatron.weights.safetensors_stream import TensorHeader, write_safetensors
from minpro_megatron.weights.table import EMBEDDING, OUTPUT, Entry, check_names, check_shape, entries, left_out

# Small enough for malloc to reuse the memory of the last piece: larger blocks are mapped and zeroed again each time.
PIECE_BYTES = 16 << 20
SHA256_FILE = "SHA256SUMS"

# Opens a progress display for a job of the given number of bytes; the callback takes the bytes of each finished piece.
type Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def to_megatron(
    hf: Path, output: Path, watch: Watch, verify: bool = False, cast_to: torch.dtype | None = None
) -> list[str]:
    """Write the Megatron checkpoint of the Hugging Face folder `hf` to `output`, in the dtype of its weights, with
    copies of its config and tokenizer. `verify`: read the result back and compare every bit before it gets its name.
    `cast_to`: every tensor is rounded to this dtype, so the weights may have different dtypes. Returns the names of the
    tensors that are left out.

    Raises ValueError for a model whose tensors differ from the table, or an `output` that contains files which this
    program did not write."""
    architecture = read_architecture(hf)
    reader = HfReader(hf)
    dtype = _check_tensors(reader, architecture, cast_to)
    num_bytes = sum(TensorHeader(entry.dtype(dtype), entry.full_shape).num_bytes for entry in entries(architecture))
    with output_folder(output, num_bytes) as folder, file_records(folder) as records:
        with watch("writing", num_bytes) as announce:
            writer = ShardedWriter(folder, records)
            for entry in entries(architecture):
                for first_row, rows in _pieces(entry, reader, entry.dtype(dtype)):
                    writer.write(place(entry, architecture), entry.full_shape, first_row, rows)
                    announce(rows.nbytes)
            writer.finish()
        sizes = _hf_bytes(reader, architecture, dtype)
        names = _keep_texts(reader, sizes, folder / HF_TEXTS)
        if cast_to:
            state_dtype(folder / HF_TEXTS / CONFIG, dtype_name(dtype))
        for name in names:
            records.add(f"{HF_TEXTS}/{name}")
        if verify:
            with watch("verifying", sum(sizes.values())) as announce:
                compare(reader, ShardedReader(folder), architecture, announce, dtype)
        manifest = ModelManifest(
            source=hf.resolve().name,
            dtype=dtype_name(dtype),  # type: ignore[arg-type]  checked above
            architecture=architecture,
            files=records.records(),
        )
        write_manifest(folder, manifest)
    return left_out(architecture, reader.names())


def to_hf(megatron: Path, output: Path, watch: Watch, reference: Path | None = None, verify: bool = False) -> None:
    """Write the Hugging Face folder of the Megatron checkpoint `megatron`, a converted model or a run's checkpoint, to
    `output`. Config, tokenizer and the names of the weight files are those of `reference`, or else of the model that
    the checkpoint was converted from or its run started from.

    Raises UserError for a checkpoint that is damaged or of another model, or an `output` that contains files which this
    program did not write."""
    manifest = read_manifest(megatron)
    of_run = is_run_checkpoint(megatron)
    texts = reference or (texts_of_run(megatron) if of_run else megatron / HF_TEXTS)
    if not (texts / CONFIG).is_file():
        raise UserError(f"{texts}: there is no {CONFIG}; give --hf-reference, a folder with config and tokenizer")
    architecture = read_architecture(texts)
    check_architecture(megatron, manifest, architecture)
    with watch("checking", sum(record.bytes for record in manifest.files.values())) as announce:
        verify_files(megatron, manifest, thoroughly=verify, announce=announce)
    dtype = getattr(torch, manifest.dtype)
    source = ShardedReader(megatron)
    for entry in entries(architecture):
        source.check(place(entry, architecture), entry.full_shape, entry.dtype(dtype))
    tensors = _hf_tensors(architecture)
    files = _files(texts, architecture, dtype)
    num_bytes = sum(tensors[name].header(dtype).num_bytes for names in files.values() for name in names)
    with output_folder(output, num_bytes) as folder, file_records(folder) as records:
        with watch("writing", num_bytes) as announce:
            for file, names in files.items():
                headers = {name: tensors[name].header(dtype) for name in names}
                stream = records.create(file)
                write_safetensors(stream, headers, lambda name: tensors[name].pieces(source), announce)
                records.close(file)
        if list(files) != [SINGLE_FILE]:
            _write_index(texts, folder, {name: file for file, names in files.items() for name in names}, num_bytes)
            records.add(INDEX)
        names = copy_texts(texts, folder)
        if of_run:  # the run may train in another dtype than that of its initial model
            state_dtype(folder / CONFIG, manifest.dtype)
            names.append(write_exported_from(folder, megatron))
        for name in names:
            records.add(name)
        if verify:
            with watch("verifying", num_bytes) as announce:
                compare(HfReader(folder), source, architecture, announce, dtype)
        (folder / SHA256_FILE).write_text("".join(sha256_lines(records.records())), encoding="utf-8")


def compare(
    reader: HfReader,
    sharded: ShardedReader,
    architecture: Architecture,
    announce: Callable[[int], None],
    dtype: torch.dtype,
) -> None:
    """Raises ValueError that names the first tensor that differs in any bit between both formats, in `dtype`."""
    tensors = _hf_tensors(architecture)
    for name in reader.names():
        first, tensor = 0, tensors.get(name)
        if tensor is None:
            continue
        for found in tensor.pieces(sharded):
            expected = reader.read_rows(name, first, len(found)).to(tensor.entry.dtype(dtype))
            if found.dtype != expected.dtype or not torch.equal(_bits(found), _bits(expected)):
                raise UserError(f"{name}: rows {first} to {first + len(found)} differ between the two formats")
            first += len(found)
            announce(found.nbytes)


@dataclass(frozen=True)
class _HfTensor:
    """One HF tensor as a part of a Megatron parameter."""

    entry: Entry
    source: int
    architecture: Architecture

    def header(self, dtype: torch.dtype) -> TensorHeader:
        """In a model of this dtype."""
        return TensorHeader(self.entry.dtype(dtype), self.entry.shapes[self.source])

    def pieces(self, sharded: ShardedReader) -> Iterator[Tensor]:
        """The tensor's rows in order, at most PIECE_BYTES at a time."""
        where, start = place(self.entry, self.architecture), 0
        for run in self.entry.split.runs(self.entry.rows):
            if run.source == self.source:
                for first, count in _cut(run.count, self.entry.shapes[self.source]):
                    yield sharded.read_rows(where, self.entry.full_shape, start + first, count)
            start += run.count


def _hf_tensors(architecture: Architecture) -> dict[str, _HfTensor]:
    tensors = {
        name: _HfTensor(entry, source, architecture)
        for entry in entries(architecture)
        for source, name in enumerate(entry.hf)
    }
    if architecture.tied_embeddings:
        tensors[OUTPUT] = tensors[EMBEDDING]  # in case the model's files contain it a second time
    return tensors


def _pieces(entry: Entry, reader: HfReader, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of each part of the parameter that is stored contiguously, at most PIECE_BYTES each."""
    start = 0
    for block in entry.split.blocks(entry.rows):
        pieces = [
            (run.source, run.first + first, count) for run in block for first, count in _cut(run.count, entry.shapes[0])
        ]
        row_bytes = _row_bytes(entry.shapes[0])
        held: list[Tensor] = []
        for source, first, count in pieces:
            if held and (sum(map(len, held)) + count) * row_bytes > PIECE_BYTES:
                yield start, _together(held)
                start, held = start + sum(map(len, held)), []
            if source is None:
                held.append(torch.zeros(count, *entry.shapes[0][1:], dtype=dtype))
            else:
                held.append(reader.read_rows(entry.hf[source], first, count).to(dtype))
        yield start, _together(held)
        start += sum(map(len, held))


def _check_tensors(reader: HfReader, architecture: Architecture, cast_to: torch.dtype | None) -> torch.dtype:
    """The dtype to write. Raises UserError unless the folder's tensors are exactly those of the table."""
    reader.refuse_quantized()
    check_names(architecture, reader.names(), str(reader.path))
    for entry in entries(architecture):
        for name, shape in zip(entry.hf, entry.shapes, strict=True):
            check_shape(name, reader.tensors[name].shape, shape)
    dtype = cast_to or reader.tensors[EMBEDDING].dtype
    remedy = "give --dtype bfloat16 or --dtype float32 to cast every tensor"
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{reader.path}: {EMBEDDING} is {dtype}, but a model must be float32 or bfloat16; {remedy}")
    for name, tensor in _hf_tensors(architecture).items():
        if cast_to is not None or name not in reader.tensors:
            continue
        found, needed = reader.tensors[name].dtype, tensor.entry.dtype(dtype)
        if found != needed:
            why = f"{EMBEDDING} is {dtype}" if needed == dtype else f"it must be {needed}"
            raise UserError(
                f"{reader.path}: {name} is {found} and {why}, and nothing is cast unless it is requested; {remedy}"
            )
    if architecture.tied_embeddings and OUTPUT in reader.tensors:
        _refuse_another_output(reader)
    return dtype


def _refuse_another_output(reader: HfReader) -> None:
    """Some tied models contain their output layer a second time; it must then equal the embedding."""
    shape = reader.tensors[EMBEDDING].shape
    check_shape(OUTPUT, reader.tensors[OUTPUT].shape, shape)
    for first, count in _cut(shape[0], shape):
        embedding, output = (_bits(reader.read_rows(name, first, count)) for name in (EMBEDDING, OUTPUT))
        if not torch.equal(embedding, output):
            raise UserError(
                f"{reader.path}: config.json sets tie_word_embeddings, but {OUTPUT} differs from {EMBEDDING}; "
                "set tie_word_embeddings to false if the model has an output layer of its own"
            )


def _keep_texts(reader: HfReader, sizes: dict[str, int], folder: Path) -> list[str]:
    """Writes what to_hf needs besides the weights: the texts, and the file of each tensor of `sizes`, in bytes."""
    folder.mkdir()
    _write_index(reader.path, folder, {name: reader.tensors[name].file for name in sizes}, sum(sizes.values()))
    return [INDEX, *copy_texts(reader.path, folder)]


def _hf_bytes(reader: HfReader, architecture: Architecture, dtype: torch.dtype) -> dict[str, int]:
    """The number of bytes in a model of `dtype` of each tensor of the Hugging Face folder that is kept."""
    kept = _hf_tensors(architecture)
    return {name: kept[name].header(dtype).num_bytes for name in reader.tensors if name in kept}


def _write_index(texts: Path, folder: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Copies the index of the model's folder byte for byte if its content is the same; otherwise writes a new one."""
    old_index = texts / INDEX
    if old_index.is_file() and read_weight_map(texts) == weight_map:
        stated = read_json_object(old_index).get("metadata")
        if isinstance(stated, dict) and stated.get("total_size") == total_bytes:
            shutil.copyfile(old_index, folder / INDEX)
            return
    write_index(folder, weight_map, total_bytes)


def _files(texts: Path, architecture: Architecture, dtype: torch.dtype) -> dict[str, list[str]]:
    """{file name: tensor names}: as in the folder `texts`, or files of SHARD_BYTES if that has no weights."""
    files: dict[str, list[str]] = {}
    known = _hf_tensors(architecture)
    if (texts / INDEX).is_file() or (texts / SINGLE_FILE).is_file():
        names = read_weight_map(texts) or dict.fromkeys(HfReader(texts).names(), SINGLE_FILE)
        check_names(architecture, names, str(texts))
        for name, file in names.items():
            if name in known:
                files.setdefault(file, []).append(name)
        return files
    shards: list[list[str]] = []
    size = SHARD_BYTES
    for entry in entries(architecture):
        for name in entry.hf:
            num_bytes = known[name].header(dtype).num_bytes
            if size + num_bytes > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += num_bytes
    return dict(zip(shard_names(len(shards)), shards, strict=True))


@contextmanager
def output_folder(output: Path, num_bytes: int) -> Iterator[Path]:
    """Context manager: a folder that becomes `output` if the block succeeds, and is removed otherwise."""
    check_replaceable(output)
    parent, remedy = existing_parent(output.absolute().parent), "choose another folder"
    free = free_bytes(parent)
    if free < num_bytes:
        raise UserError(
            f"--output = {output}: {as_size(free)} free on the file system of {parent}, {as_size(num_bytes)} needed; "
            f"free some space or {remedy}"
        )
    with naming_full_disk(parent, f"--output = {output}", remedy, num_bytes), new_folder(output) as folder:
        yield folder


def _together(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _cut(rows: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(first, count) of row ranges of at most PIECE_BYTES."""
    step = max(1, PIECE_BYTES // _row_bytes(shape))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


def _row_bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape[1:])  # of the larger dtype


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)  # NaNs with equal bits are equal
