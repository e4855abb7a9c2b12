"""Histograms that merge exactly: all parts use the same fixed bins, so merging adds the counts.

The bins suit log-ratios: evenly spaced in asinh(x / SCALE), that is about linear near 0 and logarithmic far from it.
A quantile computed from them is within one bin of the exact one: 3e-4 near 0, 3 % of the value far from it.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

SCALE = 0.01
STEP = 1 / 32
BINS_PER_SIDE = 272  # asinh(20 / SCALE) / STEP = 265.4: log-ratios are clamped to +-20
NUM_BINS = 2 * BINS_PER_SIDE


@cache
def bin_edges() -> np.ndarray:
    """float64 [NUM_BINS + 1], ascending. The first and the last bin also count the values outside the range."""
    edges = SCALE * np.sinh(STEP * np.arange(-BINS_PER_SIDE, BINS_PER_SIDE + 1))
    edges.setflags(write=False)
    return edges


def merge_histograms(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sum of the counts, [NUM_BINS] by name."""
    merged: dict[str, np.ndarray] = {}
    for part in parts:
        for name, counts in part.items():
            merged[name] = merged[name] + counts if name in merged else counts
    return merged


def histogram_quantile(counts: np.ndarray, share: float) -> float:
    """The value below which `share` of the observations lie, interpolated within its bin; NaN without observations."""
    running, edges = np.cumsum(counts), bin_edges()
    if running[-1] == 0:
        return float("nan")
    target = max(share * running[-1], np.finfo(np.float64).tiny)  # so that share = 0 does not select an empty bin
    place = int(np.searchsorted(running, target))
    inside = (target - (running[place] - counts[place])) / counts[place]
    return float(edges[place] + inside * (edges[place + 1] - edges[place]))
