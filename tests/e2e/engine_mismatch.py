"""Responses of a run for which server and trainer computed different log-probs."""

from pathlib import Path

import numpy as np

from minpro_megatron.buffer.journal_file import FILE_NAME
from minpro_megatron.buffer.journal_reader import JournalReader


def responses_that_differ(run_dir: Path, limit: float = 1e-4) -> int:
    """The number of scored responses with a token whose log-probs differ by more than `limit` nats.

    About one run in a hundred has one: a token whose second and third expert differ by less than float32's rounding
    (7e-8 in a case that was examined in float64). There server and trainer choose different experts. Under the weights
    of another version nearly all responses differ."""
    with JournalReader(run_dir / FILE_NAME) as journal:
        differences = [
            np.abs(response.behavior_log_probs - response.rollout_log_probs)
            for group in journal.groups()
            for response in group.responses
            if response.behavior_log_probs is not None and response.rollout_log_probs is not None
        ]
    assert differences
    return sum(bool((of_tokens > limit).any()) for of_tokens in differences)
