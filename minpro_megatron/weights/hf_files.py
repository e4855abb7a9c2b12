"""Reading and writing Hugging Face checkpoints: safetensors only, never pickles."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minpro_megatron.monitor.files import new_folder
from minpro_megatron.weights.text_files import copy_texts

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARD_BYTES = 4 << 30
_DTYPES: dict[str, torch.dtype | str] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
}  # as models can be built
# Files are mapped into memory, and what was read of a mapping stays resident: it is renewed after so many bytes.
_MAPPED_BYTES = 256 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and what. A dtype that no model can be built with stays the file's word for it."""

    file: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * (self.dtype.itemsize if isinstance(self.dtype, torch.dtype) else 0)


class HfReader:
    """The tensors of a Hugging Face folder by name, read one at a time or by rows, in bounded memory.

    Raises ValueError naming the file for a folder without safetensors, a missing or cut off file, or an index that
    does not fit its files.
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
                raise ValueError(f"{self.path / INDEX}: {name} is not in {file}; download the folder again")
        self._open_file: tuple[str, Any] | None = None
        self._mapped_bytes = 0

    def names(self) -> list[str]:
        return list(self.tensors)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """The whole tensor; its memory is the file's, so it must not be written to."""
        tensor = self._mapped(name).get_tensor(name)
        self._mapped_bytes += tensor.nbytes
        return tensor

    def read_rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows `first` .. `first + count` of the tensor."""
        if (first, count) == (0, self.tensors[name].shape[0]):
            return self.read(name)
        rows = self._mapped(name).get_slice(name)[first : first + count]
        self._mapped_bytes += rows.nbytes
        return rows

    def _mapped(self, name: str) -> Any:
        if name not in self.tensors:
            raise ValueError(f"{self.path}: there is no tensor {name!r}; does config.json belong to these weights?")
        file = self.tensors[name].file
        if self._open_file is None or self._open_file[0] != file or self._mapped_bytes > _MAPPED_BYTES:
            self._open_file = (file, safe_open(self.path / file, framework="pt"))
            self._mapped_bytes = 0
        return self._open_file[1]

    def _read_header(self, file: str) -> None:
        try:
            with safe_open(self.path / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  it is no dict
                    found = opened.get_slice(name)
                    word: str = found.get_dtype()
                    self.tensors[name] = StoredTensor(file, _DTYPES.get(word, word), tuple(found.get_shape()))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.path / file}: {error}; download the folder again") from None


def read_weight_map(folder: Path) -> dict[str, str]:
    """{tensor name: file name} of the folder's index, empty for a model in one file.

    Raises ValueError if there is neither, or the index is damaged or names files elsewhere.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE_FILE).is_file():
            return {}
        raise ValueError(
            f"{folder}: neither {SINGLE_FILE} nor {INDEX} is there; pickled weights are refused, "
            "convert them to safetensors first"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{index}: it has no weight_map; download the folder again") from None
    for file in files:
        if not (isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file):
            raise ValueError(f"{index}: {file!r} is not the name of a safetensors file beside it; pickles are refused")
    return weight_map


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def shard_names(count: int) -> list[str]:
    """The names of a model's weight files, as Hugging Face numbers them."""
    return [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_hf(
    tensors: Iterable[tuple[str, Tensor]],
    reference: str | Path,
    output: str | Path,
    shard_bytes: int = SHARD_BYTES,
    announce: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a Hugging Face folder: `tensors` in files of at most `shard_bytes` (each gathered in memory first), and
    config, tokenizer and the other text files of `reference`. Appears under `output` only when complete.
    `announce(bytes)` is called a tensor.
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
    file.chmod(0o644)  # safetensors makes it readable for its owner alone
    shard_of.update(dict.fromkeys(pending, files))
    return files + 1


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name as Hugging Face and SGLang write it: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")
