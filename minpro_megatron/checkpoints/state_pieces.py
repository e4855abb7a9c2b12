"""Maps the elements of a rank's parameters to parts of the checkpoint's tensors.

A distributed optimizer gives every data-parallel rank a contiguous range of elements of some parameters, which may
start and end anywhere. The checkpoint's tensors are those of the whole model, with one dimension each for layers,
experts, rows and columns, and their parts are boxes. A range consists of a few boxes: the end of a row, whole rows, and
the start of another row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from minpro_megatron.errors import UserError

# A writer copies one piece at a time, and a reader holds one: saving and loading need this memory besides the states.
PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Box:
    """A part of a tensor: its offset and size in every dimension, and its first element in memory."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Block:
    """A contiguous part of a parameter that is a box of one of the checkpoint's tensors."""

    sharded: ShardedTensor  # its data is a view of the parameter
    first: int  # element of the parameter

    @property
    def end(self) -> int:
        return self.first + math.prod(self.sharded.local_shape)


def boxes(shape: Sequence[int], first: int, end: int, max_elements: int) -> Iterator[Box]:
    """The elements [first, end) of a contiguous tensor, in order. No box has more than `max_elements`."""
    if first >= end:
        return
    if not shape:
        yield Box((), (), 0)
        return
    row = math.prod(shape[1:])
    while first < end:
        index, within = divmod(first, row)
        if within or end - first < row or row > max_elements:  # a part of one row, or a row that is too large
            stop = min(end, (index + 1) * row)
            for box in boxes(shape[1:], within, stop - index * row, max_elements):
                yield Box((index, *box.offsets), (1, *box.sizes), index * row + box.first)
        else:
            rows = min(end - first, max_elements) // row
            stop = first + rows * row
            yield Box((index, *(0 for _ in shape[1:])), (rows, *shape[1:]), first)
        first = stop


def blocks_of(sharding: ShardedTensor | ShardedTensorFactory) -> list[Block]:
    """The blocks that a parameter consists of. `sharding`: its entry in Megatron's sharded_state_dict, which for a
    joined projection is a factory of one tensor for each half.

    Raises ValueError if they do not cover the parameter.
    """
    parameter = sharding.data
    assert parameter is not None
    built = sharding.build() if isinstance(sharding, ShardedTensorFactory) else sharding
    found = []
    for one in nested_values({"": built}):
        is_view = one.data.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        if not is_view or not one.data.is_contiguous():
            raise UserError(f"{one.key}: its part of the parameter is not a contiguous view, so no range maps to it")
        found.append(Block(one, one.data.storage_offset() - parameter.storage_offset()))
    if sum(block.end - block.first for block in found) != parameter.numel():
        raise UserError(f"{sharding.key}: {len(found)} tensors of the checkpoint do not add up to the parameter")
    return found


def pieces(blocks: Sequence[Block], prefix: str, values: Tensor, first: int) -> Iterator[ShardedTensor]:
    """The parts of the checkpoint's tensors for `values`: flat elements of the parameter from `first` on.

    Their data are views of `values`, of at most PIECE_BYTES. `prefix` is put before the tensor's name. Of the ranks
    that have the same elements only one is marked as the main replica, provided that only one of the data-parallel
    ranks calls this for them.
    """
    end = first + values.numel()
    limit = PIECE_BYTES // values.element_size()
    for block in blocks:
        sharded = block.sharded
        leading = (1,) * sharded.prepend_axis_num
        begin, stop = max(first, block.first) - block.first, min(end, block.end) - block.first
        for box in boxes(sharded.local_shape, begin, stop, limit):
            start = block.first + box.first - first
            offsets = zip(sharded.global_offset, (*(0 for _ in leading), *box.offsets), strict=True)
            yield ShardedTensor(
                key=prefix + sharded.key,
                data=values[start : start + box.numel].view(*leading, *box.sizes),
                dtype=values.dtype,
                local_shape=(*leading, *box.sizes),
                global_shape=sharded.global_shape,
                global_offset=tuple(offset + within for offset, within in offsets),
                axis_fragmentations=None,
                replica_id=(*_model_parallel_replica(sharded), 0),
            )


def _model_parallel_replica(sharded: ShardedTensor) -> tuple[int, int]:
    """The replica number over pipeline stages and tensor-parallel ranks; Megatron's third number is for data ranks."""
    assert isinstance(sharded.replica_id, tuple)
    assert len(sharded.replica_id) == 3, f"{sharded.key}: (pipeline, tensor, data) expected, got {sharded.replica_id}"
    return sharded.replica_id[0], sharded.replica_id[1]
