"""Reads the servers' routes (R3) and kept ids from files: mapped into memory, so that the ranks of a node share one
copy."""

import hashlib
from dataclasses import replace

import numpy as np

from minpro_megatron.batching.row_shard import RowShard
from minpro_megatron.errors import UserError
from minpro_megatron.records import StoredArray

_DTYPES = ("|u1", "<i2", "<i4")


def read_array(stored: StoredArray, what: str = "routes") -> np.ndarray:
    """The array, read-only; `what` names it in errors. Raises ValueError if the file is missing or its bytes have
    changed."""
    if stored.dtype not in _DTYPES:
        raise UserError(f"{stored.path}: {what} of dtype {stored.dtype!r}; known: {', '.join(_DTYPES)}")
    dtype = np.dtype(stored.dtype)
    size = int(np.prod(stored.shape)) * dtype.itemsize
    try:
        data = np.memmap(stored.path, np.uint8, "r")[stored.offset : stored.offset + size]
    except OSError as error:
        raise UserError(f"{stored.path}: these {what} cannot be read ({error.strerror})") from None
    except ValueError:  # an empty file cannot be mapped
        data = np.empty(0, np.uint8)
    if hashlib.sha256(data).hexdigest() != stored.sha256:
        raise UserError(
            f"{stored.path}: these {what} are damaged (their checksum differs); put the file back, or give a new run "
            "name"
        )
    return data.view(dtype).reshape(stored.shape)


def with_routes_read(row: RowShard) -> RowShard:
    """The row with its stored routes replaced by arrays. Raises ValueError as read_array does."""
    read = [read_array(routes) if isinstance(routes, StoredArray) else routes for routes in row.routed_experts]
    return replace(row, routed_experts=read)


def with_supports_read(row: RowShard) -> RowShard:
    """The row with its stored supports replaced by arrays. Raises ValueError as read_array does."""
    read = [read_array(one, "kept ids") if isinstance(one, StoredArray) else one for one in row.supports]
    return replace(row, supports=read)
