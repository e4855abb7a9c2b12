"""Reading and writing Hugging Face checkpoints: safetensors only, never pickles."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import new_folder
from minpro_megatron.models.architecture import MAX_EXPERTS
from minpro_megatron.models.model_files import is_lfs_pointer, lfs_problem
from minpro_megatron.models.text_files import copy_texts
from minpro_megatron.models.weight_files import (
    FUSED_EXPERTS,
    INDEX,
    SINGLE_FILE,
    read_weight_map,
    shard_names,
    write_index,
)

SHARD_BYTES = 4 << 30
_DTYPES: dict[str, torch.dtype | str] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
}  # dtypes that models can be built with
CASTABLE = ("F16", "F64")  # other dtypes that can be cast to one of them
# Files are mapped into memory, and the pages that were read stay resident: a file is mapped again after this size.
_MAPPED_BYTES = 256 << 20


@dataclass(frozen=True)
class ExpertRows:
    """The rows of one expert's tensor within a tensor of all experts."""

    name: str
    expert: int
    first_row: int


@dataclass(frozen=True)
class StoredTensor:
    """The location, dtype and shape of a tensor. A dtype that no model can be built with is the file's name for it."""

    file: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]
    within: ExpertRows | None = None


class HfReader:
    """The tensors of a Hugging Face folder by name, read one at a time or by rows, in bounded memory.

    Raises ValueError that names the file for a folder without safetensors, a missing or truncated file, or an index
    that does not match its files.
    """

    def __init__(self, hf_path: str | Path) -> None:
        self.path = Path(hf_path)
        self.tensors: dict[str, StoredTensor] = {}
        weight_map = read_weight_map(self.path)
        files = dict.fromkeys(weight_map.values()) if weight_map else dict.fromkeys([SINGLE_FILE])
        for file in files:
            self._read_header(file)
        for name, file in weight_map.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise UserError(f"{self.path / INDEX}: {name} is not in {file}; download the folder again")
        self.tensors = dict(_separate_experts(self.tensors))
        self._open_file: tuple[str, Any] | None = None
        self._mapped_bytes = 0

    def names(self) -> list[str]:
        return list(self.tensors)

    def refuse_quantized(self) -> None:
        """Raises UserError that names the first tensor of a dtype that no weights are trained in, such as float8. Their
        scales are tensors of their own, so that without this check they would be reported as unknown names."""
        for name, tensor in self.tensors.items():
            if not isinstance(tensor.dtype, torch.dtype) and tensor.dtype not in CASTABLE:
                raise UserError(
                    f"{self.path}: {name} is {tensor.dtype}: these are quantized or unknown weights; use the release "
                    "in bfloat16, or `minpro convert dequantize` for float8 with scales of blocks"
                )

    def read(self, name: str) -> Tensor:
        """The whole tensor. Its memory is a mapping of the file and must not be written to."""
        if name in self.tensors and self.tensors[name].within:
            return self.read_rows(name, 0, self.tensors[name].shape[0])
        tensor = self._mapped(name).get_tensor(name)
        self._mapped_bytes += tensor.nbytes
        return tensor

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows `first` .. `first + count` of the tensor."""
        within = self.tensors[name].within
        if within:
            first, expert = within.first_row + first, within.expert
            rows = self._mapped(name).get_slice(within.name)[expert : expert + 1, first : first + count][0]
        elif (first, count) == (0, self.tensors[name].shape[0]):
            return self.read(name)
        else:
            rows = self._mapped(name).get_slice(name)[first : first + count]
        self._mapped_bytes += rows.nbytes
        return rows

    def _mapped(self, name: str) -> Any:
        if name not in self.tensors:
            raise UserError(f"{self.path}: there is no tensor {name!r}; does config.json belong to these weights?")
        file = self.tensors[name].file
        if self._open_file is None or self._open_file[0] != file or self._mapped_bytes > _MAPPED_BYTES:
            self._open_file = (file, safe_open(self.path / file, framework="pt"))
            self._mapped_bytes = 0
        return self._open_file[1]

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.path / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  it is not a dict
                    found = opened.get_slice(name)
                    word: str = found.get_dtype()
                    self.tensors[name] = StoredTensor(file, _DTYPES.get(word, word), tuple(found.get_shape()))
        except (OSError, SafetensorError) as error:
            if is_lfs_pointer(self.path / file):
                raise UserError(lfs_problem(self.path / file)) from None
            raise UserError(f"{self.path / file}: {error}; download the folder again") from None


def _separate_experts(stored: dict[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors under the names of the original format, in which each expert has its own tensors."""
    for name, tensor in stored.items():
        fused = FUSED_EXPERTS.fullmatch(name)
        if not fused or len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS:
            yield name, tensor
            continue
        experts, rows, columns = tensor.shape
        parts = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
        shape = (rows // len(parts), columns)
        for expert in range(experts):
            for place, part in enumerate(parts):
                within = ExpertRows(name, expert, place * shape[0])
                yield f"{fused[1]}.{expert}.{part}.weight", replace(tensor, shape=shape, within=within)


def write_hf(
    tensors: Iterable[tuple[str, Tensor]],
    reference: str | Path,
    output: str | Path,
    shard_bytes: int = SHARD_BYTES,
    announce: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a Hugging Face folder: `tensors` in files of at most `shard_bytes` (each gathered in memory first), and
    config, tokenizer and the other text files of `reference`. The folder appears at `output` only when complete.
    `announce(bytes)` is called for each tensor.
    """
    with new_folder(Path(output)) as folder:
        shard_of, pending, size, files, total = {}, {}, 0, 0, 0
        for name, tensor in tensors:
            if size + tensor.nbytes > shard_bytes:
                files, pending, size = _flush(folder, files, pending, shard_of), {}, 0
            pending[name] = tensor.detach().contiguous().cpu()
            size += tensor.nbytes
            total += tensor.nbytes
            announce(tensor.nbytes)
        files = _flush(folder, files, pending, shard_of)
        names = shard_names(files)
        for index, name in enumerate(names):
            (folder / f"part-{index}.safetensors").rename(folder / name)
        if files > 1:
            write_index(folder, {key: names[shard] for key, shard in shard_of.items()}, total)
        copy_texts(Path(reference), folder)


def _flush(folder: Path, files: int, pending: dict[str, Tensor], shard_of: dict[str, int]) -> int:
    if not pending:
        return files
    file = folder / f"part-{files}.safetensors"
    save_file(pending, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes it readable only for its owner
    shard_of.update(dict.fromkeys(pending, files))
    return files + 1


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name as Hugging Face and SGLang write it: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")
