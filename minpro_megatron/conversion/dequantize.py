"""Writes a model folder in bfloat16 from a release in float8 with a scale for each block of a weight.

This is the form of DeepSeek-V3 and of Qwen3's FP8 releases (`quant_method` fp8 with `weight_block_size`): beside every
float8 tensor NAME there is NAME_scale_inv, by whose entries the blocks are multiplied.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minpro_megatron.checkpoints.file_records import file_records, sha256_lines
from minpro_megatron.conversion.convert import PIECE_BYTES, SHA256_FILE, Watch, output_folder
from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import parse_architecture
from minpro_megatron.models.model_files import read_json_object
from minpro_megatron.models.text_files import CONFIG, copy_texts, state_dtype
from minpro_megatron.models.weight_files import INDEX, SINGLE_FILE, write_index
from minpro_megatron.weights.hf_files import HfReader, dtype_name
from minpro_megatron.weights.safetensors_stream import TensorHeader, write_safetensors
from minpro_megatron.weights.table import check_names

SCALES = "_scale_inv"
_FLOAT8 = "F8_E4M3"


@dataclass(frozen=True)
class _Blocks:
    """Rows and columns of the blocks that have a scale each."""

    rows: int
    columns: int

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (-(-shape[0] // self.rows), -(-shape[1] // self.columns))


def dequantize(hf: Path, output: Path, watch: Watch) -> None:
    """Writes the folder `hf` to `output` with its float8 tensors in bfloat16, the others unchanged, and a config.json
    without quantization. The files have the same names.

    Raises UserError for another kind of quantization, an architecture that is not supported, tensors without scales or
    scales without tensors, or an `output` that contains files which this program did not write."""
    config = read_json_object(hf / CONFIG)
    blocks = _read_blocks(config, hf / CONFIG)
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    reader = HfReader(hf)
    headers = _headers(reader, blocks)
    check_names(parse_architecture(plain, str(hf / CONFIG)), headers, str(hf))
    files: dict[str, list[str]] = {}
    for name in headers:
        files.setdefault(reader.tensors[name].file, []).append(name)
    num_bytes = sum(header.num_bytes for header in headers.values())
    with output_folder(output, num_bytes) as folder, file_records(folder) as records:
        with watch("writing", num_bytes) as announce:
            for file, names in files.items():
                stream = records.create(file)
                of_file = {name: headers[name] for name in names}
                write_safetensors(stream, of_file, lambda name: _pieces(reader, name, blocks), announce)
                records.close(file)
        if list(files) != [SINGLE_FILE]:
            write_index(folder, {name: file for file, names in files.items() for name in names}, num_bytes)
            records.add(INDEX)
        names = copy_texts(hf, folder)
        (folder / CONFIG).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        state_dtype(folder / CONFIG, dtype_name(torch.bfloat16))
        for name in names:
            records.add(name)
        (folder / SHA256_FILE).write_text("".join(sha256_lines(records.records())), encoding="utf-8")


def _read_blocks(config: dict[str, Any], path: Path) -> _Blocks:
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        raise UserError(
            f"{path}: there is no quantization_config, so there is nothing to dequantize; convert the folder"
        )
    sizes = stated.get("weight_block_size")
    for name, supported in (("quant_method", "fp8"), ("fmt", "e4m3")):
        found = stated.get(name, "e4m3" if name == "fmt" else None)
        if found != supported:
            raise UserError(
                f"{path}: quantization_config.{name} = {found!r} cannot be dequantized; only {supported!r} can, with a "
                "scale for each block; use the release in bfloat16"
            )
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)):
        raise UserError(
            f"{path}: quantization_config.weight_block_size = {sizes!r} must be the rows and columns of a block, such "
            "as [128, 128]; use the release in bfloat16"
        )
    return _Blocks(*sizes)


def _headers(reader: HfReader, blocks: _Blocks) -> dict[str, TensorHeader]:
    """The tensors to write."""
    headers, scales = {}, {name for name in reader.tensors if name.endswith(SCALES)}
    for name, tensor in reader.tensors.items():
        if name.endswith(SCALES):
            continue
        dtype = torch.bfloat16 if tensor.dtype == _FLOAT8 else tensor.dtype
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"{reader.path}: {name} is {dtype}, which is not dequantized; use the release in bfloat16")
        if tensor.dtype == _FLOAT8:
            of_blocks = reader.tensors.get(name + SCALES)
            if of_blocks is None:
                raise UserError(
                    f"{reader.path}: {name} is {_FLOAT8} without {name + SCALES}; download the folder again"
                )
            if not isinstance(of_blocks.dtype, torch.dtype):
                raise UserError(
                    f"{reader.path}: {name + SCALES} is {of_blocks.dtype}, but only scales in float32 or bfloat16 are "
                    "read; use the release in bfloat16"
                )
            if len(tensor.shape) != 2 or of_blocks.shape != blocks.scale_shape(tensor.shape):
                raise UserError(
                    f"{reader.path}: {name + SCALES} has the shape {of_blocks.shape}, which is not that of blocks of "
                    f"{blocks.rows} x {blocks.columns} of {name}, {tensor.shape}; download the folder again"
                )
            scales.discard(name + SCALES)
        headers[name] = TensorHeader(dtype, tensor.shape)
    if scales:
        raise UserError(f"{reader.path}: {min(scales)} belongs to no {_FLOAT8} tensor; download the folder again")
    return headers


def _pieces(reader: HfReader, name: str, blocks: _Blocks) -> Iterator[Tensor]:
    """The tensor's rows in order, about PIECE_BYTES at a time, whole blocks each."""
    tensor = reader.tensors[name]
    if not tensor.shape or tensor.dtype != _FLOAT8:
        yield reader.read(name)
        return
    scales = reader.read(name + SCALES).float()
    count = max(1, PIECE_BYTES // (4 * tensor.shape[1] * blocks.rows)) * blocks.rows
    for first in range(0, tensor.shape[0], count):
        rows = reader.read_rows(name, first, min(count, tensor.shape[0] - first))
        yield scaled(rows, scales[first // blocks.rows :], blocks.rows, blocks.columns).to(torch.bfloat16)


def scaled(rows: Tensor, scales: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """float32 [R, C]: float8 `rows` [R, C] times the scales of their blocks, float32 [>= R / block_rows, C /
    block_columns], both rounded up. Each product is rounded once."""
    of_rows = scales.repeat_interleave(block_rows, 0)[: rows.shape[0]]
    return rows.float() * of_rows.repeat_interleave(block_columns, 1)[:, : rows.shape[1]]
