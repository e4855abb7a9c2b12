"""Corrections that look at whole sequences are those of a float64 loop on ranks that hold pieces of the sequences."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.metrics import metric
from minpro_megatron.objective.across_ranks.scan import Operator
from minpro_megatron.objective.across_ranks.sharded_scan import ShardedScan
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.ragged_batch import SHORTEST_ROW, in_order
from tests.mesh.steps import loaded_policy, step_config
from tests.support import objective_loops as loops
from tests.support.long_cases import long_after
from tests.support.objective_loops import LOOPS, OtherNumbers
from tests.support.ragged_tokens import Tokens

pytestmark = pytest.mark.mesh

TOLERANCE = 2e-6  # the ranks return float32 numbers
MESHES = [{"pipeline": 2, "context": 2}, {"tensor": 2, "context": 2}, {"pipeline": 2, "tensor": 2, "context": 2}]
# each masks some of the batch's tokens with an advantage, and none of them all
WEIGHT = "sequence_importance"
SWITCHES: dict[str, dict[str, Any]] = {
    "weight, mean, off-policy": {
        WEIGHT: {"enabled": True},
        "rejection": {"enabled": True, "high": 0.05},
        "off_policy_masking": {"enabled": True, "largest_mean_log_ratio": 0.0},
    },
    "sum": {"rejection": {"enabled": True, "statistic": "sum", "estimator": "k1", "low": -3, "high": 1}},
    "largest": {"rejection": {"enabled": True, "statistic": "max", "estimator": "k2", "high": 0.3}},
}
NAMES = [*SWITCHES, *(f"{name}: share of {part}" for name in SWITCHES for part in SWITCHES[name] if part != WEIGHT)]
Found = dict[str, tuple[dict[str, np.ndarray], dict[str, float]]]


def _local_whole(self: ShardedScan, values_L: torch.Tensor, operator: Operator) -> torch.Tensor:
    """The reduction over this rank's slots alone."""
    halves = self._runs.totals(self._local(values_L, operator), 2 * self._num_sequences, operator).view(-1, 2)
    own = halves.amin(1) if operator == "min" else halves.sum(1)
    return own[torch.div(self._runs.key_L, 2, rounding_mode="floor")]


def _on_rank(mesh: Mesh, config: RunConfig, hf_path: str, sequences: Sequence[TokenSequence], is_wrong: bool) -> Found:
    """By the name of the switches: what the mini-batch's tokens get, and the metrics of its loss."""
    found = {}
    for name, switches in SWITCHES.items():
        loss = LossConfig.model_validate(switches)
        _, policy = loaded_policy(mesh, config.model_copy(update={"loss": loss}), hf_path)
        with mock.patch.object(ShardedScan, "whole", _local_whole) if is_wrong else nullcontext():
            seen = policy.inspect(sequences)
            metrics, _, _ = policy.accumulate_gradient(sequences)
        found[name] = (seen, metric.values(metric.merge(mesh.from_all_ranks(metrics))))
    return found


def as_tokens(sequences: Sequence[TokenSequence], log_probs: np.ndarray) -> tuple[Tokens, OtherNumbers]:
    lengths = [len(sequence.response_ids) for sequence in sequences]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(sequence, name) for sequence in sequences])

    tokens = Tokens(
        log_probs,
        joined("behavior_log_probs"),
        np.repeat([sequence.advantage for sequence in sequences], lengths),
        joined("loss_mask"),
        np.repeat(np.arange(len(sequences)), lengths),
    )
    return tokens, OtherNumbers(joined("rollout_log_probs"), tokens.behavior, tokens.behavior)


def with_mismatch(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The servers' log-probs differ from the trainer's; those of masked tokens are anything."""
    random = np.random.default_rng(8)
    return [
        replace(
            one,
            rollout_log_probs=np.where(
                one.loss_mask > 0, one.behavior_log_probs + random.normal(0, 0.3, len(one.loss_mask)), -55.0
            ).astype(np.float32),
        )
        for one in sequences
    ]


def differences(found: Found, sequences: Sequence[TokenSequence], config: RunConfig) -> dict[str, float]:
    """The largest difference of a coefficient from the loop's, relative to the largest, and of the share of tokens that
    a correction masked."""
    result = {}
    for name, (seen, metrics) in found.items():
        tokens, others = as_tokens(sequences, seen["log_probs"])
        plain = LOOPS["minpro"](tokens, config.objective)
        loss = LossConfig.model_validate(SWITCHES[name])
        expected = np.array(loops.corrected(plain, tokens, others, loss).coefficients)[tokens.trained]
        coefficients = seen["coefficients"][tokens.trained]
        result[name] = float(np.abs(coefficients - expected).max() / np.abs(expected).max())
        for section in SWITCHES[name].keys() - {WEIGHT}:
            alone = LossConfig.model_validate({section: SWITCHES[name][section]})
            masked = np.array(loops.sequence_factors(tokens, others, alone))[tokens.trained] == 0
            assert np.array(plain.coefficients)[tokens.trained][masked].any(), (name, section)
            result[f"{name}: share of {section}"] = abs(metrics[f"corrections/{section}_tokens"] - masked.mean())
    return result


@pytest.mark.parametrize("parallel", long_after(1, MESHES), ids=str)
def test_corrections_of_whole_sequences_equal_the_loop(parallel: dict[str, int], starts: dict[str, Start]) -> None:
    start = starts["dense"]
    sequences, config = with_mismatch(in_order(start.groups)), step_config(parallel, row_tokens=2 * SHORTEST_ROW)
    ranks = run_mesh(_on_rank, config, start.hf_path, sequences, False, **parallel)
    for found in ranks:
        assert differences(found, sequences, config) == pytest.approx(dict.fromkeys(NAMES, 0.0), abs=TOLERANCE)


def test_corrections_that_add_up_only_a_ranks_own_tokens_are_noticed(starts: dict[str, Start]) -> None:
    start, parallel = starts["dense"], {"context": 2}
    sequences, config = with_mismatch(in_order(start.groups)), step_config(parallel, row_tokens=2 * SHORTEST_ROW)
    ranks = run_mesh(_on_rank, config, start.hf_path, sequences, True, **parallel)
    assert min(differences(ranks[0], sequences, config).values()) > 1000 * TOLERANCE
