"""Scans over ranks that hold pieces of packed rows equal loops over the whole sequences."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from minpro_megatron.batching.shards import chunk_halves, context_shard, row_multiple, sequence_multiple, tensor_shard
from minpro_megatron.objective.across_ranks.scan import IDENTITY, Operator
from minpro_megatron.objective.across_ranks.sharded_scan import ShardedScan
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.support.long_cases import long_rows_after

pytestmark = pytest.mark.mesh

COMBINE: dict[Operator, Callable] = {"min": min, "sum": math.fsum}


@dataclass(frozen=True)
class Row:
    """A packed row: padded sequence lengths, and a value and a mask for each position."""

    lengths: list[int]
    values: np.ndarray
    mask: np.ndarray


def random_rows(context_size: int, tensor_size: int) -> list[Row]:
    """Ragged rows of many short or few long sequences; holes, and sequences masked wholly."""
    rows = []
    for seed in range(24):
        random = np.random.default_rng(seed)
        count, longest = random.integers(1, 9), random.integers(1, 9)
        lengths = (random.integers(1, longest + 1, count) * sequence_multiple(context_size)).tolist()
        lengths[-1] += -sum(lengths) % row_multiple(context_size, tensor_size)
        total = sum(lengths)
        mask = (random.random(total) > 0.4).astype(np.float32)
        mask[np.repeat(np.arange(count), lengths) == count - 3] = 0
        rows.append(Row(lengths, random.normal(0, 2, total), mask))
    return rows


def chunks_cut_between_tensor_ranks(rows: list[Row], context_size: int, tensor_size: int) -> set[tuple[int, int]]:
    """(context rank, half) of the chunks of which more than one tensor rank holds a part."""
    cut = set()
    for row in rows:
        halves = chunk_halves(row.lengths, context_size)
        sequence = np.repeat(np.arange(len(row.lengths)), row.lengths)
        for context_rank in range(context_size):
            held = sequence[context_shard(row.lengths, context_size, context_rank)]
            for tensor_rank in range(1, tensor_size):
                first = tensor_shard(len(held), tensor_size, tensor_rank).start
                if held[first - 1] == held[first] and halves[first - 1] == halves[first]:
                    cut.add((context_rank, int(halves[first])))
    return cut


def _scan_on_rank(mesh: Mesh, rows: list[Row]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """For every row: the positions that this rank holds, and the scans there by name."""
    found = []
    for row in rows:
        held = context_shard(row.lengths, mesh.context.size(), mesh.context.rank())
        piece = tensor_shard(len(held), mesh.tensor.size(), mesh.tensor.rank())
        positions = held[piece]
        scan = ShardedScan(
            torch.from_numpy(np.repeat(np.arange(len(row.lengths)), row.lengths)[positions]),
            torch.from_numpy(chunk_halves(row.lengths, mesh.context.size())[piece]),
            torch.from_numpy(row.mask[positions]),
            num_sequences=len(row.lengths),
            group=mesh.tensor_and_context,
            tensor_size=mesh.tensor.size(),
        )
        values = torch.from_numpy(row.values[positions])
        wild = torch.where(torch.from_numpy(row.mask[positions]) > 0, values, torch.nan)  # a mask hides anything
        scans = {}
        for operator in IDENTITY:
            scans[f"exclusive {operator}"] = scan.exclusive(wild, operator).numpy()
            scans[f"inclusive {operator}"] = scan.inclusive(wild, operator).numpy()
            scans[f"whole {operator}"] = scan.whole(wild, operator).numpy()
        found.append((positions, scans))
    return found


def expected_scans(row: Row) -> dict[str, np.ndarray]:
    kinds = ("exclusive", "inclusive", "whole")
    expected = {f"{kind} {operator}": np.zeros(sum(row.lengths)) for kind in kinds for operator in COMBINE}
    start = 0
    for length in row.lengths:
        trained = [place for place in range(start, start + length) if row.mask[place]]
        for place in range(start, start + length):
            earlier = [row.values[other] for other in trained if other < place]
            up_to_here = [row.values[other] for other in trained if other <= place]
            for operator, combine in COMBINE.items():
                none = IDENTITY[operator]
                expected[f"exclusive {operator}"][place] = combine(earlier) if earlier else none
                expected[f"inclusive {operator}"][place] = combine(up_to_here) if up_to_here else none
                expected[f"whole {operator}"][place] = combine(row.values[trained]) if trained else none
        start += length
    return expected


@pytest.mark.parametrize(("context", "tensor"), long_rows_after(2, [(1, 1), (2, 2), (4, 2), (1, 2), (2, 1)]))
def test_sharded_scans_equal_loops_over_whole_sequences(context: int, tensor: int) -> None:
    rows = random_rows(context, tensor)
    if context > 1 and tensor > 1:  # the rows must try the order of tensor ranks inside front and back chunks
        assert len(chunks_cut_between_tensor_ranks(rows, context, tensor)) == 2 * context
    ranks = run_mesh(_scan_on_rank, rows, context=context, tensor=tensor)
    for index, row in enumerate(rows):
        expected = expected_scans(row)
        seen = np.concatenate([rank[index][0] for rank in ranks])
        assert sorted(seen.tolist()) == list(range(sum(row.lengths)))
        for positions, scans in (rank[index] for rank in ranks):
            for name, found in scans.items():
                np.testing.assert_allclose(found, expected[name][positions], rtol=0, atol=1e-12, err_msg=name)
