"""Which checksum of a version's weights is right."""

from collections import Counter
from collections.abc import Mapping


def right_checksums(checksums: Mapping[int, str], sizes: Mapping[int, int], known: Mapping[int, str]) -> dict[int, str]:
    """The right checksum by tensor-parallel size, since other shards have other checksums: that of servers which have
    the version already (`known`, by size), or else that of more than half of the servers of that size. A size without
    such a checksum is not included.

    Args:
        checksums: of the weights of each server, by index.
        sizes: the tensor-parallel size of each server.

    >>> right_checksums({0: "5e", 1: "6f", 2: "5e", 3: "77"}, {0: 1, 1: 1, 2: 1, 3: 2}, {})
    {1: '5e', 2: '77'}
    """
    by_size: dict[int, list[str]] = {}
    for index, checksum in checksums.items():
        by_size.setdefault(sizes[index], []).append(checksum)
    right = {}
    for size, found in by_size.items():
        checksum, count = Counter(found).most_common(1)[0]
        if size in known:
            right[size] = known[size]
        elif count > len(found) / 2:
            right[size] = checksum
    return right
