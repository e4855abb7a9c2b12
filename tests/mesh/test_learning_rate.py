"""Schedules equal Megatron's, and the effective sample size is that of the whole mini-batch on every mesh."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from minpro_megatron.actor.learning_rate import learning_rate_at
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.optimizer import OptimizerConfig
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.metrics import metric
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.ragged_batch import in_order
from tests.mesh.steps import LEARNING_RATE, loaded_policy, step_config
from tests.support.long_cases import long_after

pytestmark = pytest.mark.mesh

STEPS = 12
SCHEDULES = [
    OptimizerConfig(learning_rate=2e-3, warmup_global_steps=3),
    OptimizerConfig(learning_rate=2e-3, warmup_global_steps=3, schedule="linear", decay_global_steps=9),
    OptimizerConfig(
        learning_rate=2e-3, warmup_global_steps=0, schedule="cosine", decay_global_steps=10, min_learning_rate=3e-4
    ),
]


def _of_megatron(mesh: Mesh, config: OptimizerConfig) -> list[float]:
    from types import SimpleNamespace

    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    scheduler = OptimizerParamScheduler(
        optimizer,  # pyright: ignore[reportArgumentType]
        init_lr=0.0,
        max_lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        lr_warmup_steps=config.warmup_global_steps,
        lr_decay_steps=config.decay_global_steps or 10**9,
        lr_decay_style=config.schedule,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    found = []
    for _ in range(STEPS):
        scheduler.step(1)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda config: config.schedule)
def test_schedules_equal_megatrons(config: OptimizerConfig) -> None:
    (expected,) = run_mesh(_of_megatron, config)
    assert [learning_rate_at(config, step) for step in range(STEPS)] == pytest.approx(expected, rel=1e-14)


def _scaled(
    mesh: Mesh, config: RunConfig, hf_path: str, sequences: Sequence[TokenSequence]
) -> tuple[np.ndarray, float, float | None]:
    _, policy = loaded_policy(mesh, config, hf_path)
    log_probs = policy.score(sequences)
    result = policy.update(sequences, LEARNING_RATE)
    metrics = metric.values(metric.merge(mesh.from_all_ranks(result.metrics)))
    return log_probs, result.learning_rate, metrics["optimizer/learning_rate_factor"]


MESHES = [{}, {"pipeline": 2, "context": 2}, {"tensor": 2, "data": 2}]


@pytest.mark.parametrize("parallel", long_after(1, MESHES), ids=str)
def test_the_effective_sample_size_scales_the_learning_rate(parallel: dict[str, int], starts: dict[str, Start]) -> None:
    """arXiv:2602.17616: of the importance ratios of whole sequences, over all ranks and micro-batches."""
    start, sequences = starts["dense"], in_order(starts["dense"].groups)
    config = with_overrides(
        step_config(parallel),
        ["optimizer.scale_by_effective_sample_size=true", "optimizer.reference_effective_sample_size=0.9"],
    )
    for log_probs, learning_rate, factor in run_mesh(_scaled, config, start.hf_path, sequences, **parallel):
        ratios, first = [], 0
        for sequence in sequences:
            new = log_probs[first : first + len(sequence.response_ids)]
            first += len(new)
            differences = (new.astype(np.float64) - sequence.behavior_log_probs)[sequence.loss_mask > 0]
            if len(differences):
                ratios.append(math.exp(min(20.0, max(-20.0, math.fsum(np.clip(differences, -20, 20))))))
        share = sum(ratios) ** 2 / (len(ratios) * sum(ratio**2 for ratio in ratios))
        assert 0.05 < share < 0.9
        assert factor == pytest.approx(math.sqrt(share / 0.9), rel=1e-4)  # sums of log-probs of float32
        assert learning_rate == LEARNING_RATE * factor
