"""Snapshots of weights: what is kept comes back, and their memory is hardly more than the weights'."""

import itertools

import pytest
import torch
from torch.nn import Parameter

from minpro_megatron.host_memory.host_blocks import host_tensors, pack
from minpro_megatron.host_memory.snapshots import WeightSnapshots

SHAPES = [(3, 4), (5,), (), (2, 3, 4), (5,), (0, 4)]
DTYPES = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
MIB = 2**20


def parameters() -> list[Parameter]:
    made = [Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]
    change(made, 0)
    return made


def change(weights: list[Parameter], version: int) -> None:
    with torch.no_grad():
        for place, weight in enumerate(weights):
            weight.copy_((torch.arange(weight.numel()) + 10 * place + 100 * version).view(weight.shape))


def values(weights: list[Parameter]) -> list[list]:
    return [weight.detach().flatten().tolist() for weight in weights]


def test_what_was_kept_is_in_place_within_and_the_current_weights_after() -> None:
    weights = parameters()
    snapshots = WeightSnapshots(weights)
    seen = {}
    for version, name in enumerate(["first", "second"]):
        change(weights, version)
        seen[name] = values(weights)
        snapshots.keep(name)
    change(weights, 2)
    current, memory = values(weights), [weight.data_ptr() for weight in weights]
    for name in ("first", "second", "first"):
        with snapshots.swapped_in(name):
            assert values(weights) == seen[name]
        assert values(weights) == current
    snapshots.keep("first")  # in place of what was kept
    change(weights, 3)
    with snapshots.swapped_in("first"):
        assert values(weights) == current
    assert [weight.data_ptr() for weight in weights] == memory


def test_host_tensors_are_like_theirs_and_share_few_blocks() -> None:
    made = host_tensors(parameters())
    assert [tuple(tensor.shape) for tensor in made] == SHAPES
    assert [tensor.dtype for tensor in made] == DTYPES
    assert all(tensor.is_contiguous() for tensor in made)
    assert len({tensor.untyped_storage().data_ptr() for tensor in made}) == 2  # one for each dtype
    spans = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in made)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def dense_model(hidden: int, feed_forward: int, layers: int, kv_heads: int, vocabulary: int) -> list[int]:
    """Bytes of each bfloat16 weight; heads of 128."""
    layer = [hidden, hidden, 128, 128, hidden * (hidden + 256 * kv_heads), hidden * hidden]
    layer += [2 * feed_forward * hidden, feed_forward * hidden]
    return [2 * size for size in [*layer * layers, vocabulary * hidden, vocabulary * hidden, hidden]]


@pytest.mark.parametrize(
    "sizes",
    [
        dense_model(2560, 9728, 36, 8, 151936),
        dense_model(4096, 12288, 36, 8, 151936),
        dense_model(4096, 12288, 9, 8, 75968),
        [4096 * 2048 * 2, 4096, *[3 * 768 * 2048 * 2] * 16] * 48,
        [3 * MIB] * 700,
    ],
)
def test_rounded_blocks_are_hardly_larger_than_what_they_hold(sizes: list[int]) -> None:
    blocks = pack(sizes)
    assert sorted(place for block in blocks for place in block) == list(range(len(sizes)))
    taken = sum(rounded(sum(sizes[place] for place in block)) for block in blocks)
    assert taken <= 1.02 * sum(sizes)
    assert len(blocks) <= 12


def test_a_weight_that_is_most_of_all_takes_the_others_along() -> None:
    assert pack([MIB, 600 * MIB, 2 * MIB]) == [[1, 2, 0]]
    assert pack([1, 2, 3]) == [[2, 1, 0]]  # too small to be cut
    assert pack([]) == []


def rounded(size: int) -> int:
    """What torch's pinned allocator takes for a request."""
    return 1 << (size - 1).bit_length()
