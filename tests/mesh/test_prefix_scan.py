"""Scans over ranks that hold pieces of packed rows equal loops over the whole sequences."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from minpro_megatron.batching.shards import chunk_halves, context_shard, row_multiple, sequence_multiple, tensor_shard
from minpro_megatron.objective.scan import IDENTITY
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.parallel.prefix_scan import ShardedScan
from tests.mesh.harness import run_mesh

pytestmark = pytest.mark.mesh

COMBINE = {"min": min, "sum": math.fsum}


@dataclass(frozen=True)
class Row:
    """A packed row: padded sequence lengths, and a value and a mask for each position."""

    lengths: list[int]
    values: np.ndarray
    mask: np.ndarray


def random_rows(context_size: int, tensor_size: int) -> list[Row]:
    """Ragged rows: many short sequences, few long ones, one alone; holes, and sequences masked wholly."""
    rows = []
    for seed, (count, longest) in enumerate([(9, 2), (4, 7), (1, 5), (6, 5), (2, 9)]):
        random = np.random.default_rng(seed)
        lengths = (random.integers(1, longest + 1, count) * sequence_multiple(context_size)).tolist()
        lengths[-1] += -sum(lengths) % row_multiple(context_size, tensor_size)
        total = sum(lengths)
        mask = (random.random(total) > 0.4).astype(np.float32)
        mask[np.repeat(np.arange(count), lengths) == count - 3] = 0
        rows.append(Row(lengths, random.normal(0, 2, total), mask))
    return rows


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
            scans[f"whole {operator}"] = scan.whole(wild, operator).numpy()
        found.append((positions, scans))
    return found


def expected_scans(row: Row) -> dict[str, np.ndarray]:
    expected = {
        f"{kind} {operator}": np.zeros(sum(row.lengths)) for kind in ("exclusive", "whole") for operator in COMBINE
    }
    start = 0
    for length in row.lengths:
        trained = [place for place in range(start, start + length) if row.mask[place]]
        for place in range(start, start + length):
            earlier = [row.values[other] for other in trained if other < place]
            for operator, combine in COMBINE.items():
                none = IDENTITY[operator]
                expected[f"exclusive {operator}"][place] = combine(earlier) if earlier else none
                expected[f"whole {operator}"][place] = combine(row.values[trained]) if trained else none
        start += length
    return expected


@pytest.mark.parametrize(("context", "tensor"), [(1, 1), (1, 2), (2, 1), (2, 2), (4, 2)])
def test_sharded_scans_equal_loops_over_whole_sequences(context: int, tensor: int) -> None:
    rows = random_rows(context, tensor)
    ranks = run_mesh(_scan_on_rank, rows, context=context, tensor=tensor)
    for index, row in enumerate(rows):
        expected = expected_scans(row)
        seen = np.concatenate([rank[index][0] for rank in ranks])
        assert sorted(seen.tolist()) == list(range(sum(row.lengths)))
        for positions, scans in (rank[index] for rank in ranks):
            for name, found in scans.items():
                np.testing.assert_allclose(found, expected[name][positions], rtol=0, atol=1e-12, err_msg=name)
