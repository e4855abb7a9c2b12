"""Writes a safetensors file piece by piece: the safetensors package needs all tensors of a file in memory.

The format (github.com/huggingface/safetensors): the header's length as 8 bytes, little endian; the header, JSON padded
with spaces to a multiple of 8; the tensors' bytes. Tensors of float32 come before those of bfloat16, and those of one
dtype are in the order of their names, as the package writes them, so that a model file written by it is reproduced byte
for byte.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class TensorHeader:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ByteStream(Protocol):
    def write(self, data: bytes | memoryview, /) -> int: ...

    def tell(self) -> int: ...


def write_safetensors(
    file: ByteStream,
    headers: Mapping[str, TensorHeader],
    pieces: Callable[[str], Iterable[Tensor]],
    announce: Callable[[int], None],
) -> None:
    """Write the tensors of `headers` to the empty `file`. `pieces(name)` yields a tensor's rows, in
    order; `announce(bytes)` is called for each piece."""
    names = sorted(headers, key=lambda name: (-headers[name].dtype.itemsize, name))
    file.write(_encoded({name: headers[name] for name in names}))
    for name in names:
        before = file.tell()
        for rows in pieces(name):
            file.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
            announce(rows.nbytes)
        assert file.tell() - before == headers[name].num_bytes, f"{name}: its size differs from its header"


def _encoded(headers: Mapping[str, TensorHeader]) -> bytes:
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, header in headers.items():
        end = start + header.num_bytes
        described[name] = {"dtype": _NAMES[header.dtype], "shape": list(header.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
