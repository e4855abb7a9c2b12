"""Hugging Face folders of small models with random bits, and what their files hold."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minpro_megatron.conversion import convert
from minpro_megatron.files.replacement import LIST_OF_FILES
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.weights.table import entries

MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 4,
    "hidden_size": 8,
    "moe_intermediate_size": 6,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": 37,  # padded to 128 in Megatron
}


class Watch:
    """A progress display that counts."""

    def __init__(self) -> None:
        self.jobs: dict[str, list[int]] = {}

    @contextmanager
    def __call__(self, what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
        self.jobs[what] = [num_bytes, 0]

        def announce(num_bytes: int) -> None:
            self.jobs[what][1] += num_bytes

        yield announce


def random_bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """All bit patterns, NaNs among them."""
    word, bits = (torch.int32, 31) if dtype == torch.float32 else (torch.int16, 15)
    return torch.randint(-(2**bits), 2**bits, shape, dtype=word).view(dtype)


def make_model(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, num_files: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("the tokenizer")
    tensors = {
        name: random_bits(shape, entry.dtype(dtype))
        for entry in entries(read_architecture(folder))
        for name, shape in zip(entry.hf, entry.shapes, strict=True)
    }
    write_tensors(folder, tensors, num_files)
    return folder


def write_tensors(folder: Path, tensors: dict[str, Tensor], num_files: int = 1) -> None:
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(num_files):  # layers and files do not coincide
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        shard = dict(list(tensors.items())[number::num_files])
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same_files(found: Path, expected: Path) -> None:
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == names | {"SHA256SUMS", LIST_OF_FILES}
    for name in names:
        if name.endswith(".index.json"):
            assert json.loads((found / name).read_text()) == json.loads((expected / name).read_text())
        else:
            assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def read_tensors(hf: Path) -> dict[str, Tensor]:
    reader = convert.HfReader(hf)
    return {name: reader.read(name).clone() for name in reader.names()}
