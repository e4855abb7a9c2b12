"""The run stops at its first batch if servers and trainer hold different weights."""

from dataclasses import replace

import numpy as np
import pytest

from tests.mesh.reference import make_sequences

pytestmark = pytest.mark.mesh  # train.py imports megatron


@pytest.mark.parametrize(("shift", "refused"), [(0.0, False), (0.05, False), (0.2, True), (float("nan"), True)])
def test_first_batch_sampled_by_other_weights_is_refused(shift: float, refused: bool) -> None:
    from minpro_megatron.train import refuse_different_models

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
