"""Ranges of parameters as boxes of the checkpoint's tensors, and whether boxes make up a tensor."""

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.default_planner import _validate_global_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from minpro_megatron.checkpoints import shard_coverage, state_pieces
from minpro_megatron.checkpoints.shard_coverage import incompleteness
from minpro_megatron.checkpoints.state_pieces import blocks_of, boxes, pieces


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 2, 4), (4, 1, 3), (2, 0, 3)], ids=str)
def test_boxes_are_the_range_in_order_and_no_larger_than_asked(shape: tuple[int, ...]) -> None:
    total = math.prod(shape)
    elements = np.arange(total).reshape(shape)
    for limit in (1, 4, 7, 100):
        for first in range(total):
            for end in range(first, total + 1):
                found = list(boxes(shape, first, end, limit))
                values = [elements[tuple(map(slice, box.offsets, np.add(box.offsets, box.sizes)))] for box in found]
                assert [box.sizes for box in found] == [part.shape for part in values]
                assert [box.first for box in found] == [int(part.flat[0]) for part in values]
                assert [int(one) for part in values for one in part.flat] == list(range(first, end))
                assert max((box.numel for box in found), default=0) <= limit


def test_a_range_is_few_boxes() -> None:
    found = list(boxes((100, 50), 130, 4321, 10**9))
    assert [(box.offsets, box.sizes) for box in found] == [
        ((2, 30), (1, 20)),
        ((3, 0), (83, 50)),
        ((86, 0), (1, 21)),
    ]


def _factory(parameter: torch.Tensor, build: Any) -> ShardedTensorFactory:
    merge: Any = None  # nothing is merged here
    return ShardedTensorFactory("fc1", parameter, build, merge, replica_id=(0, 0, 5))


def _sharding(parameter: torch.Tensor, tensor_rank: int) -> ShardedTensorFactory:
    """As megatron saves a joined projection of layer 1 of 3 on one of two tensor ranks: gate and up are apart."""

    def build(key: str, data: torch.Tensor, replica_id: tuple, _: None) -> list[ShardedTensor]:
        halves = zip(torch.chunk(data, 2), (tensor_rank, 2 + tensor_rank), strict=True)
        return [
            ShardedTensor.from_rank_offsets(
                key, half, (0, 1, 3), (1, place, 4), replica_id=replica_id, prepend_axis_num=1
            )
            for half, place in halves
        ]

    return _factory(parameter, build)


def _stored(ranks: int, cuts: Callable[[int], list[int]]) -> tuple[np.ndarray, list[ChunkStorageMetadata]]:
    """The tensor that two tensor ranks with `ranks` data ranks each write of their ranges, NaN where nobody does."""
    whole, parts = np.full((3, 8, 3), np.nan, np.float32), []
    for tensor_rank in range(2):
        parameter = torch.arange(12.0).view(4, 3) + 100 * tensor_rank
        blocks = blocks_of(_sharding(parameter, tensor_rank))
        bounds = cuts(ranks)
        for first, end in pairwise(bounds):
            for piece in pieces(blocks, "moments.", parameter.view(-1)[first:end], first):
                assert piece.key == "moments.fc1"
                assert piece.replica_id == (0, 0, 0)
                assert piece.data is not None
                ends = np.add(piece.global_offset, piece.local_shape)
                whole[tuple(map(slice, piece.global_offset, ends))] = piece.data.numpy()
                parts.append(ChunkStorageMetadata(torch.Size(piece.global_offset), torch.Size(piece.local_shape)))
    return whole, parts


@pytest.mark.parametrize("ranks", [1, 2, 5, 12])
def test_ranges_of_any_number_of_ranks_are_the_same_tensor(ranks: int) -> None:
    whole, parts = _stored(ranks, lambda count: [12 * rank // count for rank in range(count + 1)])
    rows = np.arange(12).reshape(4, 3)
    assert np.isnan(whole[[0, 2]]).all()
    np.testing.assert_array_equal(whole[1], np.concatenate([rows[:2], 100 + rows[:2], rows[2:], 100 + rows[2:]]))
    layer = [ChunkStorageMetadata(part.offsets[1:], part.sizes[1:]) for part in parts]
    assert incompleteness((8, 3), layer) is None


def test_large_ranges_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_pieces, "PIECE_BYTES", 16)
    whole, parts = _stored(1, lambda _: [0, 12])
    assert max(math.prod(part.sizes) for part in parts) <= 4
    assert not np.isnan(whole[1]).any()


def test_what_is_no_view_of_the_parameter_is_refused() -> None:
    parameter = torch.zeros(4, 4)

    def transposed(key: str, data: torch.Tensor, replica_id: tuple, _: None) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, data.T, replica_id=replica_id)

    with pytest.raises(ValueError, match="fc1: its part of the parameter is not a contiguous view"):
        blocks_of(_factory(parameter, transposed))

    def half(key: str, data: torch.Tensor, replica_id: tuple, _: None) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(key, data[:2], replica_id=replica_id)

    with pytest.raises(ValueError, match="fc1: 1 tensors of the checkpoint do not add up to the parameter"):
        blocks_of(_factory(parameter, half))


def _torch_accepts(size: tuple[int, ...], parts: list[ChunkStorageMetadata]) -> bool:
    tensor = TensorStorageMetadata(TensorProperties(), torch.Size(size), parts)
    plans = [SavePlan([]), SavePlan([])]  # of one plan it does not compare the sum
    return not _validate_global_plan(plans, Metadata({"tensor": tensor}))


def test_incomplete_tensors_are_those_that_torch_finds() -> None:
    """Grids of boxes, whole or with one of them missing, twice or moved."""
    draw = random.Random(7)
    verdicts = []
    for _ in range(150):
        size = tuple(draw.randint(1, 5) for _ in range(draw.randint(1, 3)))
        cuts = [sorted({0, length, *(draw.randrange(length + 1) for _ in range(2))}) for length in size]
        parts = [ChunkStorageMetadata(torch.Size(()), torch.Size(()))]
        for bounds in cuts:
            parts = [
                ChunkStorageMetadata(torch.Size((*part.offsets, first)), torch.Size((*part.sizes, end - first)))
                for part in parts
                for first, end in pairwise(bounds)
            ]
        change = draw.choice(["none", "none", "drop", "twice", "move"])
        chosen = draw.choice(parts)
        if change in ("drop", "move"):
            parts.remove(chosen)
        if change == "twice":
            parts.append(chosen)
        if change == "move":
            moved = (chosen.offsets[0] + draw.choice([-1, 1]), *chosen.offsets[1:])
            parts.append(ChunkStorageMetadata(torch.Size(moved), chosen.sizes))
        draw.shuffle(parts)
        verdicts.append(incompleteness(size, parts) is None)
        assert verdicts[-1] == _torch_accepts(size, parts), (size, parts)
    assert {True, False} == set(verdicts)


def test_the_experts_of_a_mixture_are_not_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers' experts are one tensor: 12,288 parts with Qwen3-30B-A3B, and minutes for all pairs of them."""
    monkeypatch.setattr(shard_coverage, "_overlap", lambda *_: pytest.fail("two parts were compared"))
    parts = [
        ChunkStorageMetadata(torch.Size((layer, expert, *offsets)), torch.Size((1, 1, *sizes)))
        for layer in range(12)
        for expert in range(16)
        for offsets, sizes in [((0, 0), (700, 20)), ((700, 0), (1, 7)), ((700, 7), (1, 13)), ((701, 0), (67, 20))]
    ]
    assert incompleteness((12, 16, 768, 20), parts) is None
    assert incompleteness((12, 16, 768, 20), parts[1:]) == "its parts contain 2,935,120 of 2,949,120 elements"
