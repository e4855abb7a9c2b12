"""The buckets of a publication: how parameters are shared out among them, and the memory that they take."""

import pytest
import torch

from minpro_megatron.publishing.broadcast import bucket_memory
from minpro_megatron.publishing.gather import consecutive_buckets
from tests.mesh.live_bytes import LiveBytes


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([3, 3, 3, 3], [[3, 3, 3], [3]]),
        ([9, 9, 1], [[9], [9, 1]]),  # closed before the entry that does not fit
        ([4, 25, 4, 4], [[4], [25], [4, 4]]),  # larger than a bucket: alone, not on top of a bucket
        ([25, 4], [[25], [4]]),
        ([10], [[10]]),
    ],
    ids=str,
)
def test_only_a_single_parameter_exceeds_the_size_of_a_bucket(sizes: list[int], expected: list[list[int]]) -> None:
    assert [sizes[bucket] for bucket in consecutive_buckets(sizes, 10)] == expected


def test_a_larger_bucket_does_not_wait_for_the_smaller_buffer_to_be_released() -> None:
    """Two buffers exist at any time: the one being sent, and the one being filled."""
    memory = bucket_memory()
    small, large = torch.arange(1 << 16, dtype=torch.uint8), torch.arange(1 << 18, dtype=torch.uint8)
    with LiveBytes() as live:
        for tensor in (small, small, large, large, small):
            assert torch.equal(memory.fill([tensor]), tensor)
        assert live.peak == 2 * large.nbytes
