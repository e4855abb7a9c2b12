"""What must hold before the first update: trainer and servers have the same weights, and every ratio is 1."""

from collections.abc import Mapping, Sequence

import numpy as np

from minpro_megatron.batching.collate import TokenSequence

LARGEST_START_MISMATCH = 0.1  # nats, mean over tokens; float32 engines differ by 1e-7, bfloat16 ones by about 1e-2
# Of the first mini-batch's log-ratios, root mean square and largest: other rows are packed around a sequence when it is
# trained on than when it was scored, which changes roundings, and in bfloat16 now and then an expert's choice.
LARGEST_START_RATIO = {"float32": (1e-4, 1e-2), "bfloat16": (0.05, 2.0)}


def refuse_different_models(sequences: Sequence[TokenSequence], log_probs: np.ndarray) -> None:
    """Raises ValueError if the servers sampled the first batch with other weights than the trainer's initial ones."""
    rollout = np.concatenate([sequence.rollout_log_probs for sequence in sequences])
    mismatch = float(np.abs(rollout - log_probs).mean())
    if not mismatch <= LARGEST_START_MISMATCH:
        raise ValueError(
            f"batch 0: the servers' log-probs differ from the trainer's by {mismatch:.3g} nats a token (limit "
            f"{LARGEST_START_MISMATCH}): model.megatron_path and model.hf_path hold different weights; convert again"
        )


def refuse_broken_scores(index: int, log_probs: np.ndarray) -> None:
    """Raises ValueError if a log-prob is NaN or infinite: ratios against it would be no numbers either."""
    broken = int(np.count_nonzero(~np.isfinite(log_probs)))
    if broken:
        raise ValueError(
            f"batch {index}: {broken} of {len(log_probs)} behavior log-probs are not finite: the weights hold NaN or "
            "infinity; look for a diverging loss or gradient norm before it, and start again from earlier weights"
        )


def refuse_unequal_start(metrics: Mapping[str, float], dtype: str) -> None:
    """Raises ValueError if the first mini-batch, of staleness 0 and before any update, has a ratio other than 1.

    `metrics` are its merged metrics. The trainer then disagrees with itself: nothing that follows would be right.
    """
    limit, largest_limit = LARGEST_START_RATIO[dtype]
    spread = metrics["ratio/log_second_moment"] ** 0.5
    largest = max(abs(np.log(metrics["ratio/min"])), abs(np.log(metrics["ratio/max"])))
    if spread <= limit and largest <= largest_limit:
        return
    raise ValueError(
        f"the first mini-batch has staleness 0 and comes before any update, but its ratios are not 1: log-ratio "
        f"{spread:.3g} root mean square (limit {limit:g}), {largest:.3g} at most (limit {largest_limit:g}): scoring "
        "and training compute different log-probs; with staleness.behavior_log_probs = rollout the servers do, else "
        "compare tools/compare_logits.py on this mesh and on one rank"
    )
