"""The runs of the study, and the rule by which its learning rate was chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.recipes import stability_study

OBJECTIVES = (
    "minpro",
    "cispo",
    "scaled_cispo",
    "shuffled_minpro",
    "prefix_ratio",
    "prefix_filter",
    "grpo",
    "gspo",
    "m2po",
    "ctpo",
)
DELAYS = (0, 2, 8)  # global steps
SEEDS = (0, 1, 2)

# The sweep was fixed before its first run. It uses the two most common objectives without any prefix, on a seed that
# no run of the study has, and chooses the largest rate at which on-policy training is still within ON_POLICY_MARGIN of
# the best on-policy result while the longest delay costs at least STALENESS_LOSS; accuracies are the mean of both
# objectives' final ones. If no rate does, it chooses the one with the largest loss among those within the margin.
# One thing was changed after the first five of its runs: they showed 2.5e-4, then the lowest rate, ahead of 5e-4 even
# on-policy, so the rates 2.5e-4 .. 4e-3 were moved down by a factor of four. The rule was not changed.
SWEPT_OBJECTIVES = ("grpo", "cispo")
SWEPT_DELAYS = (0, 8)
SWEPT_RATES = (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)
SWEEP_SEED = 100
ON_POLICY_MARGIN = 0.05
STALENESS_LOSS = 0.10


@dataclass(frozen=True, order=True)
class RunKey:
    """One run. Seeds decide the order of the prompts and the sampling, the same for every objective and delay."""

    objective: str
    delay_steps: int
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.objective}-delay{self.delay_steps}-seed{self.seed}-rate{self.learning_rate:g}"

    def config(self, runs_dir: str, *overrides: str) -> RunConfig:
        settings = [f"name={self.name}", f"runs_dir={runs_dir}", f"seed={self.seed}"]
        settings += [f"objective.name={self.objective}", f"staleness.delay_steps={self.delay_steps}"]
        settings += [f"optimizer.learning_rate={self.learning_rate}", *overrides]
        return with_overrides(stability_study.run(), settings)


def sweep_keys() -> list[RunKey]:
    return [
        RunKey(objective, delay, SWEEP_SEED, rate)
        for rate in SWEPT_RATES
        for delay in SWEPT_DELAYS
        for objective in SWEPT_OBJECTIVES
    ]


def study_keys(learning_rate: float, seeds: Sequence[int] = SEEDS) -> list[RunKey]:
    """Seed by seed, so that an interrupted study has complete seeds."""
    return [
        RunKey(objective, delay, seed, learning_rate) for seed in seeds for delay in DELAYS for objective in OBJECTIVES
    ]


def sweep_table(final: Mapping[RunKey, float]) -> dict[float, tuple[float, float]]:
    """(final accuracy on-policy, with the longest delay) by rate; means over the swept objectives."""
    return {
        rate: (
            fmean(final[RunKey(name, SWEPT_DELAYS[0], SWEEP_SEED, rate)] for name in SWEPT_OBJECTIVES),
            fmean(final[RunKey(name, SWEPT_DELAYS[1], SWEEP_SEED, rate)] for name in SWEPT_OBJECTIVES),
        )
        for rate in SWEPT_RATES
    }


def choose_rate(table: Mapping[float, tuple[float, float]]) -> float:
    """The rate of the study by the rule above.

    >>> choose_rate({1e-4: (0.90, 0.88), 2e-4: (0.93, 0.7), 4e-4: (0.91, 0.6), 8e-4: (0.5, 0.1)})
    0.0004
    """
    best = max(on_policy for on_policy, _ in table.values())
    learning = {rate: row for rate, row in table.items() if row[0] >= best - ON_POLICY_MARGIN}
    hurt = [rate for rate, (on_policy, stale) in learning.items() if on_policy - stale >= STALENESS_LOSS]
    return max(hurt) if hurt else max(learning, key=lambda rate: learning[rate][0] - learning[rate][1])
