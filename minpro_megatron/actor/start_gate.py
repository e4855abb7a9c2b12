"""Checks before the first update: trainer and servers have the same weights, and every ratio is 1."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.errors import RunBlocked, RunFailed
from minpro_megatron.metrics.histograms import bin_edges

log = logging.getLogger(__name__)

MAX_START_MISMATCH = 0.1  # nats, mean over tokens; float32 engines differ by 1e-7, bfloat16 ones by about 1e-2
# For the first mini-batch's log-ratios. Scoring packs its rows as the update does, so both compute the same numbers
# except for kernels that add in no fixed order. If a router's scores of two experts are almost equal, that difference
# can change the chosen expert. Single tokens among millions may therefore differ much; the limit is on their mean.
MAX_START_RMS = {"float32": 1e-4, "bfloat16": 0.05}
FAR_NATS = 0.5
MAX_START_FAR_SHARE = 1e-3
WARN_NATS = {"float32": 1e-2, "bfloat16": 2.0}  # for one token


def refuse_different_models(
    sequences: Sequence[TokenSequence], log_probs: np.ndarray, sampled: np.ndarray | None = None
) -> None:
    """Raises RunBlocked if the servers sampled the first batch with weights other than the trainer's initial ones.
    `sampled`, bool [all response tokens], says which tokens are compared (None: all): given ones have no log-probs."""
    rollout = np.concatenate([sequence.rollout_log_probs for sequence in sequences])
    differences = np.abs(rollout - log_probs)
    mismatch = float((differences if sampled is None else differences[sampled]).mean())
    if not mismatch <= MAX_START_MISMATCH:
        raise RunBlocked(
            f"batch 0: the servers' log-probs differ from the trainer's by {mismatch:.3g} nats per token (limit "
            f"{MAX_START_MISMATCH}): model.megatron_path and model.hf_path hold different weights; convert again"
        )


def refuse_broken_scores(index: int, log_probs: np.ndarray) -> None:
    """Raises RunFailed if a log-prob is NaN or infinite: its ratios would not be finite either."""
    broken = int(np.count_nonzero(~np.isfinite(log_probs)))
    if broken:
        raise RunFailed(
            f"batch {index}: {broken} of {len(log_probs)} behavior log-probs are not finite: the weights contain NaN "
            "or infinity; look for a diverging loss or gradient norm in earlier steps, and restart from earlier weights"
        )


def refuse_unequal_start(metrics: Mapping[str, float], log_ratios: np.ndarray, dtype: str) -> None:
    """Raises RunFailed if the first mini-batch, of staleness 0 and before any update, has ratios other than 1.

    `metrics` are its merged metrics, `log_ratios` the merged histogram "ratio/log" (metrics.histograms). Ratios other
    than 1 mean that scoring and training disagree: no later result would be correct. A single token that differs much
    is only a warning.
    """
    limit, rms = MAX_START_RMS[dtype], metrics["ratio/log_second_moment"] ** 0.5
    share = _share_beyond(log_ratios, FAR_NATS)
    largest = max(abs(np.log(metrics["ratio/min"])), abs(np.log(metrics["ratio/max"])))
    if rms <= limit and share <= MAX_START_FAR_SHARE:
        if largest > WARN_NATS[dtype]:
            log.warning(
                "the first mini-batch has staleness 0 and comes before any update; its largest log-ratio is %.3g, the "
                "root mean square %.3g: a few tokens were scored and trained with different experts or roundings",
                largest, rms,
            )  # fmt: skip
        return
    raise RunFailed(
        f"the first mini-batch has staleness 0 and comes before any update, but its ratios are not 1: log-ratio "
        f"{rms:.3g} root mean square (limit {limit:g}), {share:.3g} of the tokens beyond {FAR_NATS} nats (limit "
        f"{MAX_START_FAR_SHARE:g}), {largest:.3g} at most: scoring and training compute different log-probs; compare "
        "`minpro compare-logits` on this mesh and on one rank"
    )


def _share_beyond(counts: np.ndarray, nats: float) -> float:
    """The share of a histogram's observations further from 0 than the first bin edge that is not below `nats`."""
    middle = len(counts) // 2
    place = int(np.searchsorted(bin_edges()[middle:], nats))
    return 1 - float(counts[middle - place : middle + place].sum() / counts.sum())
