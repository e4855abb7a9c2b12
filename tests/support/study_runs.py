"""Records of runs as the stability study writes them."""

import math

from benchmarks.stability_study.curves import (
    COLUMNS,
    StoredRun,
)
from benchmarks.stability_study.grid import (
    RunKey,
)

KEY = RunKey("minpro", 8, 1, 5e-4)


def made_run(key: RunKey = KEY, heldout: tuple[float, ...] = (0.2, 0.6, 0.8, 0.4), steps: int = 6) -> StoredRun:
    columns = {name: [0.125 * step for step in range(steps)] for name in COLUMNS}
    columns["loss"][1] = math.nan
    versions = list(range(0, 2 * len(heldout), 2))
    digests = [f"{step:08x}" for step in range(steps)]
    return StoredRun(key, "ab12", steps, None, columns, digests, versions, list(heldout), [0.01] * len(heldout))
