"""The run stops at its first batch if servers and trainer hold different weights, or if its ratios are not 1."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.mesh.reference import make_sequences

pytestmark = pytest.mark.mesh  # what is tested imports megatron


@pytest.mark.parametrize(("shift", "refused"), [(0.0, False), (0.05, False), (0.2, True), (float("nan"), True)])
def test_first_batch_sampled_by_other_weights_is_refused(shift: float, refused: bool) -> None:
    from minpro_megatron.actor.start_gate import refuse_different_models

    sequences = [
        replace(sequence, rollout_log_probs=np.full(len(sequence.response_ids), -1.0 + shift, np.float32))
        for sequence in make_sequences(4, 10)
    ]
    trainer_log_probs = np.full(sum(len(sequence.response_ids) for sequence in sequences), -1.0, np.float32)
    if refused:
        with pytest.raises(ValueError, match="convert again"):
            refuse_different_models(sequences, trainer_log_probs)
    else:
        refuse_different_models(sequences, trainer_log_probs)


@pytest.mark.parametrize(
    ("dtype", "spread", "smallest", "largest", "refused"),
    [
        ("float32", 0.0, 1.0, 1.0, False),
        ("float32", 1e-6, 1 - 1e-5, 1 + 1e-5, False),
        ("float32", 1e-3, 0.999, 1.001, True),
        ("float32", 1e-6, 1.0, 1.02, True),
        ("float32", 1e-6, 0.98, 1.0, True),
        ("bfloat16", 1e-2, 0.9, 1.1, False),
        ("bfloat16", 0.2, 0.9, 1.1, True),
        ("bfloat16", 1e-2, 0.9, 20.0, True),
        ("float32", math.nan, 1.0, 1.0, True),
        ("float32", 0.0, math.nan, 1.0, True),
    ],
)
def test_ratios_other_than_one_before_any_update_are_refused(
    dtype: str, spread: float, smallest: float, largest: float, refused: bool
) -> None:
    from minpro_megatron.actor.start_gate import refuse_unequal_start

    metrics = {"ratio/log_second_moment": spread**2, "ratio/min": smallest, "ratio/max": largest}
    if refused:
        with pytest.raises(ValueError, match="its ratios are not 1"):
            refuse_unequal_start(metrics, dtype)
    else:
        refuse_unequal_start(metrics, dtype)
