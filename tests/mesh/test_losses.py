"""On ranks that hold shards of the sequences, the parts of the loss functions add up to the loss of one process."""

import warnings

import numpy as np
import pytest

from minpro_megatron.batching.shards import context_shard
from minpro_megatron.objective.loss_functions.token_batch import ContextLayout
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.support.loss_inputs import FUNCTIONS, LossInputs, padded
from tests.support.ragged_tokens import random_tokens

pytestmark = pytest.mark.mesh

RANKS = 2
WIDTH = 32  # of the padded sequences, whose longest has 30 tokens
ARGUMENTS = {
    "gspo": {"clip_low": 0.1, "clip_high": 0.15},
    "m2po": {"second_moment": 0.2},
    "m2po_winsorized": {"second_moment": 0.2},
    "prefix_filter": {"quantile": 0.2},
    "shuffled_minpro": {"seed": 3},
}
Found = dict[str, tuple[float, np.ndarray, dict[str, float]]]


def columns(layout: ContextLayout, rank: int) -> np.ndarray:
    """The columns of the padded tensors that a rank holds."""
    if layout == "zigzag":
        return context_shard([WIDTH], RANKS, rank)
    return np.arange(rank * WIDTH // RANKS, (rank + 1) * WIDTH // RANKS)


def losses(inputs: LossInputs, **arguments: object) -> Found:
    found = {}
    for name in FUNCTIONS:
        # the aggregation is the same code for every objective: both for one of them, and each in turn for the others
        for aggregation in ("token_mean", "sequence_mean") if name == "minpro" else (_aggregation(name),):
            metrics: dict[str, float] = {}
            loss, gradient = inputs.loss(
                name, aggregation=aggregation, metrics=metrics, **arguments, **ARGUMENTS.get(name, {})
            )
            found[f"{name} {aggregation}"] = (loss, gradient, metrics)
    return found


def _aggregation(name: str) -> str:
    return ("token_mean", "sequence_mean")[list(FUNCTIONS).index(name) % 2]


def _on_rank(mesh: Mesh, inputs: LossInputs) -> dict[str, Found]:
    warnings.simplefilter("error", FutureWarning)  # torch's, for collectives that it will rename
    found = {}
    for layout in ("zigzag", "contiguous"):
        shard = inputs.where(columns(layout, mesh.context.rank()))
        rows, width = shard.mask.shape
        as_packed = LossInputs(*(values.reshape(-1) for values in vars(shard).values()))
        boundaries = (np.arange(rows + 1) * width).tolist()
        context = {"context_group": mesh.context, "context_layout": layout}
        found[f"{layout} padded"] = losses(shard, **context)
        found[f"{layout} packed"] = losses(as_packed, cu_seqlens=boundaries, **context)
    return found


def test_the_parts_of_two_context_ranks_add_up_to_the_loss_of_one_process() -> None:
    inputs = padded(random_tokens(1), multiple=WIDTH)
    expected = losses(inputs)
    ranks = run_mesh(_on_rank, inputs, context=RANKS)
    for kind in ranks[0]:
        for name, (loss, gradient, metrics) in expected.items():
            parts = [rank[kind][name] for rank in ranks]
            assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-12), (kind, name)
            joined = np.zeros_like(gradient)
            for _, slope, _ in parts:
                joined[: len(slope)] += slope
            np.testing.assert_allclose(joined, gradient, rtol=1e-12, atol=1e-15, err_msg=f"{kind} {name}")
            for _, _, found in parts:
                assert found == pytest.approx(metrics, rel=1e-12, abs=1e-12), (kind, name)
