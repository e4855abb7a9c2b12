"""Reading and writing Hugging Face checkpoints: safetensors only, never pickles."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from minpro_megatron.monitor.files import check_replaceable, replace_folder

_MARKER = "config.json"  # a folder without it is not a Hugging Face model, and is not overwritten
_INDEX = "model.safetensors.index.json"
_NOT_WEIGHTS = ("*.json", "*.txt", "*.jinja", "*.model")


class HfReader:
    """The tensors of a Hugging Face folder by name, read one at a time."""

    def __init__(self, hf_path: str | Path) -> None:
        self.path = Path(hf_path)
        index = self.path / _INDEX
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (self.path / "model.safetensors").is_file():
            with safe_open(self.path / "model.safetensors", framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ValueError(
                f"{hf_path}: neither model.safetensors nor {_INDEX} is there; pickled weights are refused, "
                "convert them to safetensors first"
            )

    def names(self) -> list[str]:
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        if name not in self._file_of:
            raise ValueError(f"{self.path}: there is no tensor {name!r}; does config.json belong to these weights?")
        with safe_open(self.path / self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)


def write_hf(
    tensors: Iterable[tuple[str, Tensor]],
    reference: str | Path,
    output: str | Path,
    shard_bytes: int = 4 << 30,
    announce: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a Hugging Face folder: `tensors` in files of at most `shard_bytes`, and config, tokenizer and the other
    text files of `reference`. Appears under `output` only when complete. `announce(bytes)` is called a tensor.
    """
    output = Path(output)
    check_replaceable(output, marker=_MARKER)
    temporary = output.with_name(output.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weight_map, pending, size, files, total = {}, {}, 0, 0, 0
    for name, tensor in tensors:
        if size + tensor.nbytes > shard_bytes:
            files, pending, size = _flush(temporary, files, pending, weight_map), {}, 0
        pending[name] = tensor.detach().contiguous().cpu()
        size += tensor.nbytes
        total += tensor.nbytes
        announce(tensor.nbytes)
    files = _flush(temporary, files, pending, weight_map)
    _name_shards(temporary, files, weight_map, total)
    for pattern in _NOT_WEIGHTS:
        for source in Path(reference).glob(pattern):
            if not source.name.endswith(".index.json"):  # of the reference's weight files
                shutil.copy2(source, temporary / source.name)
    replace_folder(temporary, output, marker=_MARKER)


def _flush(folder: Path, files: int, pending: dict[str, Tensor], weight_map: dict[str, int]) -> int:
    if not pending:
        return files
    save_file(pending, folder / f"part-{files}.safetensors", metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(pending, files))
    return files + 1


def _name_shards(folder: Path, files: int, weight_map: dict[str, int], total: int) -> None:
    if files == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    names = [f"model-{index + 1:05d}-of-{files:05d}.safetensors" for index in range(files)]
    for index, name in enumerate(names):
        (folder / f"part-{index}.safetensors").rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: names[part] for key, part in weight_map.items()},
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=2))


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name as Hugging Face and SGLang write it: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")
