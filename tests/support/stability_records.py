"""Made-up runs and records of the stability study, with known answers."""

import math
from collections.abc import Callable

import numpy as np

from benchmarks.stability_study import grid
from benchmarks.stability_study.grid import LONGEST, OBJECTIVES, RATES, study_keys
from benchmarks.stability_study.record import StoredTrial
from benchmarks.stability_study.trial import COMPARED, TrialKey

KEY = TrialKey("study", "minpro", 16, 0, 2.5e-4)
RATE: dict[str, float] = dict.fromkeys(OBJECTIVES, 2.5e-4)
# All ratios are 1 before the first update, so that the objectives' gradients are the same.
AT_START = {f"{name}/{of}": value for name in COMPARED for of, value in (("squared_norm", 900.0), ("variance", 200.0))}


def made(key: TrialKey, accuracy: float, log_variance: float = 0.0) -> StoredTrial:
    """A run whose accuracy is constant after its start; MinPRO's relative variance is exp(log_variance) of CISPO's."""
    gradients = {"cispo/squared_norm": 8.0, "cispo/variance": 6.0}
    gradients["minpro/squared_norm"] = 1.0 + 3.0 * math.exp(log_variance)
    return StoredTrial(
        key, "setup", "machine", 30, 5, None, [0.1, *[accuracy] * 6], {"reward": [accuracy] * 6},
        {"prefix_min/mean_by_position/1": 1.0, "prefix_min/mean_by_position/32": 0.6,
         "prefix_ratio/gap_abs_by_position/1": 0.0, "prefix_ratio/gap_abs_by_position/32": 0.4},
        [AT_START, gradients | {"minpro/variance": 3.0 * math.exp(log_variance)}],
    )  # fmt: skip


def made_record(advantage: Callable[[TrialKey], float], seed: int, noise: float = 0.02) -> dict[TrialKey, StoredTrial]:
    """A complete record: accuracy 0.6 + advantage(key) + the seed's part + noise."""
    random = np.random.default_rng(seed)
    of_seed = random.normal(0, 0.1, 10)
    keys = [
        TrialKey("selection", objective, LONGEST, place, rate)
        for objective in OBJECTIVES for rate in RATES for place in grid.SELECTION_SEEDS
    ]  # fmt: skip
    record = {key: made(key, 0.5 + 0.1 * (key.learning_rate == 2.5e-4)) for key in keys}
    for key in study_keys(RATE):
        accuracy = 0.6 + advantage(key) + of_seed[key.seed] + random.normal(0, noise)
        record[key] = made(key, float(accuracy), -0.5 + random.normal(0, 0.05))
    return record
