"""Which sequences share a packed row, and which data-parallel rank trains on which rows."""

import heapq
from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], max_tokens: int, multiple: int) -> list[list[int]]:
    """Sequence indices of each row: at most `max_tokens` a row, the number of rows a multiple of `multiple`.

    Longest first, each into the emptiest row that still has room, with the fewest rows for which that works: the
    rows come out alike, so no rank waits long for another. Deterministic; inside a row indices ascend. A row is
    empty only if there are fewer sequences than rows. Raises ValueError for a sequence longer than a row.

    >>> pack_rows([5, 1, 3, 4], max_tokens=8, multiple=2)
    [[0, 1], [2, 3]]
    """
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise ValueError(
                f"sequence {index} has {length} tokens with padding, more than batch.max_tokens_per_row = "
                f"{max_tokens}; raise it or shorten the responses"
            )
    longest_first = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    num_rows = -(-max(1, -(-sum(lengths) // max_tokens)) // multiple) * multiple
    while True:
        rows = _fill(longest_first, lengths, max_tokens, num_rows)
        if rows is not None:
            return rows
        num_rows += multiple


def _fill(longest_first: list[int], lengths: Sequence[int], max_tokens: int, num_rows: int) -> list[list[int]] | None:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    # (tokens, row), emptiest first. A heap: long responses need many attempts, each over all sequences.
    filled = [(0, row) for row in range(num_rows)]
    for index in longest_first:
        tokens, emptiest = filled[0]
        if tokens + lengths[index] > max_tokens:
            return None
        rows[emptiest].append(index)
        heapq.heapreplace(filled, (tokens + lengths[index], emptiest))
    return [sorted(row) for row in rows]


def rows_of_rank(num_rows: int, data_size: int, data_rank: int) -> range:
    """The rows of one data-parallel rank: as many for each, neighbours (of like length) on different ranks."""
    assert num_rows % data_size == 0, f"{num_rows} rows cannot be shared by {data_size} ranks"
    return range(data_rank, num_rows, data_size)
