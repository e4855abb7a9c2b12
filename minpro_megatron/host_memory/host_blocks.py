"""Host memory for a list of tensors in a few large blocks: torch rounds pinned memory up to powers of two."""

from collections.abc import Sequence

import torch
from torch import Tensor

# A remainder below this size is not divided into smaller blocks.
_MIN_BLOCK_BYTES = 16 * 2**20


def host_tensors(like: Sequence[Tensor], pinned: bool = False) -> list[Tensor]:
    """Uninitialized contiguous tensors in host memory, with the shapes and dtypes of `like`. They are pinned for
    tensors on a GPU, because copies are then several times faster, and with `pinned` for all tensors."""
    made: dict[int, Tensor] = {}
    kinds = [(tensor.dtype, pinned or tensor.is_cuda) for tensor in like]
    for dtype, is_pinned in dict.fromkeys(kinds):
        own = [place for place, kind in enumerate(kinds) if kind == (dtype, is_pinned)]
        for block in pack([like[place].nbytes for place in own]):
            places = [own[index] for index in block]
            sizes = [like[place].numel() for place in places]
            memory = torch.empty(sum(sizes), dtype=dtype, pin_memory=is_pinned)
            views = zip(places, memory.split(sizes), strict=True)
            made |= {place: view.view(like[place].shape) for place, view in views}
    return [made[place] for place in range(len(like))]


def pack(sizes: Sequence[int]) -> list[list[int]]:
    """Packs all `sizes` into blocks whose sizes are slightly below powers of two; each block lists its indices in
    `sizes`.

    Torch's pinned allocator rounds every request up to a power of two (ATen/core/CachingHostAllocator.h): one block per
    tensor, or a single block for all, may take almost twice the bytes.
    """
    left = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    blocks = []
    while left:
        total = sum(sizes[place] for place in left)
        room = total if total <= _MIN_BLOCK_BYTES else 1 << (total.bit_length() - 1)
        largest = sizes[left[0]]
        room = room if largest <= room else 1 << (largest - 1).bit_length()
        block, others = [], []
        for place in left:
            fits = sizes[place] <= room
            room -= sizes[place] if fits else 0
            (block if fits else others).append(place)
        blocks.append(block)
        left = others
    return blocks
