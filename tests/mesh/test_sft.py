"""Supervised fine-tuning: loss, gradient and update of a mini-batch are those of transformers, on every mesh."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.ragged_batch import SHORTEST_ROW, in_order, shuffled
from tests.mesh.reference import BatchLoss, reference_step
from tests.mesh.steps import LEARNING_RATE, differences, loaded_policy, step_config, take_steps
from tests.support.long_cases import long_rows_after

pytestmark = pytest.mark.mesh

MESHES = [
    ("dense", {"tensor": 2, "context": 2}, True),
    ("moe", {"pipeline": 2, "data": 2, "expert": 2}, True),
    ("tied", {"pipeline": 2, "context": 2}, False),
    ("moe", {"tensor": 2, "context": 2, "expert": 2}, True),
]
SFT = ["objective.name=sft", "data.demonstrations=unused", "batch.responses_per_prompt=1"]
SFT += ["staleness.delay_steps=0", "sampling.temperature=1"]


def sft_config(parallel: dict[str, Any], aggregation: str = "token_mean", packing: bool = True) -> RunConfig:
    config = step_config(parallel, packing=packing, row_tokens=2 * SHORTEST_ROW)
    return with_overrides(config, [*SFT, f"objective.aggregation={aggregation}"])


def mean_negative_log_prob(aggregation: str) -> BatchLoss:
    def loss(sequences: Sequence[TokenSequence], log_probs: list[Tensor]) -> Tensor:
        losses = [
            -own[torch.from_numpy(sequence.loss_mask) > 0] for sequence, own in zip(sequences, log_probs, strict=True)
        ]
        if aggregation == "token_mean":
            return torch.cat(losses).mean()
        return torch.stack([of_sequence.mean() for of_sequence in losses if len(of_sequence)]).mean()

    return loss


@pytest.mark.parametrize(("kind", "parallel", "packing"), long_rows_after(1, MESHES), ids=str)
@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_a_step_equals_transformers(
    kind: str, parallel: dict[str, int], packing: bool, aggregation: str, starts: dict[str, Start]
) -> None:
    start, config = starts[kind], sft_config(parallel, aggregation, packing)
    layout = (config, shuffled(start.groups, seed=1))
    (step,) = run_mesh(take_steps, start.hf_path, [layout], **config.parallel.model_dump())[0]
    loss = mean_negative_log_prob(aggregation)
    expected = reference_step(start.model, in_order(start.groups), loss, 1.0, LEARNING_RATE, config.optimizer)
    assert differences(step, expected).breaches == []


def _metric_names(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list[TokenSequence]) -> tuple[set[str], int]:
    _, policy = loaded_policy(mesh, config, hf_path)
    result = policy.update(sequences, LEARNING_RATE)
    return set(result.metrics), len(result.histograms)


def test_metrics_that_compare_policies_are_left_out(starts: dict[str, Start]) -> None:
    start = starts["dense"]
    [(names, num_histograms)] = run_mesh(_metric_names, sft_config({}), start.hf_path, in_order(start.groups))
    assert names == {"objective/loss", "policy/entropy", "batch/padding_fraction", "batch/imbalance"}
    assert num_histograms == 0
