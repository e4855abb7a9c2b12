"""A streamed safetensors file is the very file that the safetensors package writes."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from minpro_megatron.weights.safetensors_stream import TensorHeader, write_safetensors

SHAPES = {"b.weight": (7, 5), "a.10": (3,), "a.9": (2, 3, 4), "ä": (1, 1)}


DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32": (torch.float32, torch.float32),
    "both": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("step", [1, 2, 100])
def test_the_file_is_the_packages_file_byte_for_byte(dtypes: str, step: int, tmp_path: Path) -> None:
    of_names = dict(zip(SHAPES, 2 * DTYPES[dtypes], strict=True))
    tensors = {name: torch.randn(shape).to(of_names[name]) for name, shape in SHAPES.items()}
    announced: list[int] = []

    def pieces(name: str) -> Iterator[Tensor]:
        yield from tensors[name].split(step)

    headers = {name: TensorHeader(of_names[name], shape) for name, shape in SHAPES.items()}
    with (tmp_path / "ours").open("wb") as file:
        write_safetensors(file, headers, pieces, announced.append)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert sum(announced) == sum(tensor.nbytes for tensor in tensors.values())


def test_a_piece_too_few_is_noticed() -> None:
    headers = {"a": TensorHeader(torch.float32, (3,))}
    with pytest.raises(AssertionError, match="a: its size differs from its header"):
        write_safetensors(io.BytesIO(), headers, lambda _: [torch.zeros(2)], lambda _: None)
