"""The run stops at its first batch if servers and trainer hold different weights, or if its ratios are not 1."""

import math
from dataclasses import replace

import numpy as np
import pytest

from minpro_megatron.errors import WRONG_INPUT, RunFailed
from minpro_megatron.metrics.histograms import bin_edges
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
        with pytest.raises(RunFailed, match="convert again") as failed:
            refuse_different_models(sequences, trainer_log_probs)
        assert failed.value.exit_status == WRONG_INPUT  # a job does not start the run again
    else:
        refuse_different_models(sequences, trainer_log_probs)


# far: of 100,000 tokens, how many are 3 nats off
@pytest.mark.parametrize(
    ("dtype", "rms", "smallest", "largest", "far", "outcome"),
    [
        ("float32", 0.0, 1.0, 1.0, 0, "passes"),
        ("float32", 1e-6, 1 - 1e-5, 1 + 1e-5, 0, "passes"),
        ("float32", 1e-3, 0.999, 1.001, 0, "is refused"),
        ("float32", 1e-6, 1.0, 1.02, 0, "is a warning"),
        ("float32", 1e-6, 0.98, 1.0, 0, "is a warning"),
        ("bfloat16", 1e-2, 0.9, 1.1, 0, "passes"),
        ("bfloat16", 0.2, 0.9, 1.1, 0, "is refused"),
        ("bfloat16", 1e-2, 0.9, 20.0, 1, "is a warning"),  # one expert that flipped among two million tokens
        ("bfloat16", 1e-2, 0.9, 20.0, 99, "is a warning"),
        ("bfloat16", 1e-2, 0.9, 20.0, 101, "is refused"),
        ("float32", math.nan, 1.0, 1.0, 0, "is refused"),
    ],
)
def test_ratios_other_than_one_before_any_update_are_refused(
    dtype: str, rms: float, smallest: float, largest: float, far: int, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    from minpro_megatron.actor.start_gate import refuse_unequal_start

    metrics = {"ratio/log_second_moment": rms**2, "ratio/min": smallest, "ratio/max": largest}
    log_ratios = np.histogram(np.repeat([0.0, 3.0], [100_000 - far, far]), bin_edges())[0]
    if outcome == "is refused":
        with pytest.raises(RunFailed, match="its ratios are not 1"):
            refuse_unequal_start(metrics, log_ratios, dtype)
    else:
        refuse_unequal_start(metrics, log_ratios, dtype)
        assert ("largest log-ratio" in caplog.text) == (outcome == "is a warning")


@pytest.mark.parametrize(("nats", "share"), [(0.0, 0.0), (0.45, 0.0), (-0.45, 0.0), (0.55, 0.25), (-0.55, 0.25)])
def test_the_share_of_tokens_that_are_far_off_is_read_from_the_histogram(nats: float, share: float) -> None:
    from minpro_megatron.actor.start_gate import FAR_NATS, _share_beyond

    counts = np.histogram([0.0, -1e-3, 1e-3, nats], bin_edges())[0]
    assert _share_beyond(counts, FAR_NATS) == share
