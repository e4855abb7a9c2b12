"""Checks that the parts of a tensor that all ranks write cover each element of it exactly once."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Protocol


class Part(Protocol):
    """The interface of torch.distributed.checkpoint's ChunkStorageMetadata."""

    @property
    def offsets(self) -> Sequence[int]: ...

    @property
    def sizes(self) -> Sequence[int]: ...


def incompleteness(size: Sequence[int], parts: Sequence[Part]) -> str | None:
    """The error in `parts` of a tensor of that size; None if they cover it. Takes n log n time for n parts that differ
    in layer, expert, rows or columns, as here."""
    for part in parts:
        ends = [offset + length for offset, length in zip(part.offsets, part.sizes, strict=True)]
        if min(part.offsets, default=0) < 0 or any(end > limit for end, limit in zip(ends, size, strict=True)):
            return f"a part at {tuple(part.offsets)} of size {tuple(part.sizes)} is outside {tuple(size)}"
    for one, other in _overlaps([part for part in parts if math.prod(part.sizes)], 0):
        return f"the parts at {tuple(one.offsets)} and {tuple(other.offsets)} overlap"
    elements = sum(math.prod(part.sizes) for part in parts)
    if elements != math.prod(size):
        return f"its parts contain {elements:,} of {math.prod(size):,} elements"
    return None


def _overlaps(parts: list[Part], dim: int) -> Iterator[tuple[Part, Part]]:
    """Pairs with common elements. Parts that are separate in some dimension are not compared."""
    if len(parts) < 2:
        return
    if dim == len(parts[0].sizes):
        yield from (pair for pair in combinations(parts, 2) if _overlap(*pair))
        return
    parts = sorted(parts, key=lambda part: part.offsets[dim])
    first, end = 0, 0
    for place, part in enumerate(parts):
        if part.offsets[dim] >= end:
            yield from _overlaps(parts[first:place], dim + 1)
            first = place
        end = max(end, part.offsets[dim] + part.sizes[dim])
    yield from _overlaps(parts[first:], dim + 1)


def _overlap(one: Part, other: Part) -> bool:
    places = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + width and b < a + length for a, length, b, width in places)
