"""Python objects as one flat array of bytes, in which numpy arrays are copied once.

`pickle` alone copies every array into its output and again out of it. With protocol 5 (PEP 574) it hands arrays over
as buffers: the sender copies each one into the flat array, and the receiver's arrays are views of that array.
"""

import pickle
from typing import Any

import numpy as np

_ALIGNMENT = 64  # bytes: at least what every dtype needs
_HEADER = 2  # numbers at the start: bytes of the pickled object, number of buffers


def flattened(value: Any) -> np.ndarray:
    """`value` as uint8 [bytes]."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    sizes = np.array([len(pickled), len(raw), *(len(one) for one in raw)], np.int64)
    pieces = [sizes.view(np.uint8).data, memoryview(pickled), *raw]
    starts, total = _starts([len(piece) for piece in pieces])
    flat = np.empty(total, np.uint8)
    for start, piece in zip(starts, pieces, strict=True):
        flat[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
    return flat


def unflattened(flat: np.ndarray) -> Any:
    """The object that `flattened` was given. Its arrays share the memory of `flat`, and keep it alive."""
    integer = np.dtype(np.int64).itemsize
    header = flat[: _HEADER * integer].view(np.int64)
    num_sizes = _HEADER + int(header[1])
    sizes = flat[: num_sizes * integer].view(np.int64)
    lengths = [num_sizes * integer, int(sizes[0]), *sizes[_HEADER:].tolist()]
    starts, _ = _starts(lengths)
    pieces = [flat[start : start + length].data for start, length in zip(starts, lengths, strict=True)]
    return pickle.loads(pieces[1], buffers=pieces[2:])


def _starts(lengths: list[int]) -> tuple[list[int], int]:
    """(where each piece starts, aligned; the total)."""
    starts, end = [], 0
    for length in lengths:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        starts.append(start)
        end = start + length
    return starts, end
