"""An example of an advantage: `loss.advantage=docs.examples.advantage:shorter_is_better`.

tests/unit/hooks/test_hook_examples.py computes advantages with it as a run does.
"""

import numpy as np

PRICE_PER_TOKEN = 1e-3


def shorter_is_better(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """R - mean, where every token of a response costs a thousandth, so that of two correct responses the shorter one is
    preferred. Equal rewards give a signal here, as long as the lengths differ.

    `rewards` is float64 and `lengths` int64, both [responses]. The result is one finite number per response, and must
    depend on nothing but the arguments: every rank of the trainer computes it.
    """
    prices = rewards - PRICE_PER_TOKEN * lengths
    return prices - prices.mean()
