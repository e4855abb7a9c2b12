"""Compares the estimators of the advantage with verl's on the same random groups.

    ../verl_env/bin/python -m benchmarks.advantages_with_verl [--groups 2000]

This check is not part of the tests, because it needs verl (benchmarks/README.md says how to get it). It prints a
Markdown table of the largest absolute differences over all groups, and ends with status 1 if one exceeds the limit
stated in the table. The groups have 2 to 16 responses; every fourth group has rewards of 0 and 1, every fourth equal
rewards, the others normally distributed ones. verl gets each reward as the sum of its tokens' rewards, in float64.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn

from minpro_megatron.objective.advantages import ADVANTAGES, group_advantages

RESPONSE_TOKENS = 5


@dataclass(frozen=True)
class Case:
    estimator: str
    verl: str
    settings: dict[str, bool]
    allowed: float  # largest difference in float64


CASES = [
    # in a group of equal rewards the mean's rounding is divided by a deviation of 0 plus 1e-6
    Case("group_normalized", "grpo", {"norm_adv_by_std_in_grpo": True}, 1e-8),
    Case("group_mean", "grpo", {"norm_adv_by_std_in_grpo": False}, 1e-12),
    Case("leave_one_out", "rloo", {}, 1e-12),
]


def random_groups(count: int) -> Iterator[np.ndarray]:
    """The rewards of each group, float64."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        size = int(random.integers(2, 17))
        if seed % 4 == 0:
            yield random.integers(0, 2, size).astype(np.float64)
        elif seed % 4 == 1:
            yield np.full(size, random.normal())
        else:
            yield random.normal(3, 2, size)


def verls(case: Case, rewards: np.ndarray) -> np.ndarray:
    by_token = torch.zeros(len(rewards), RESPONSE_TOKENS, dtype=torch.float64)
    by_token[:, -1] = torch.from_numpy(rewards)
    index = np.zeros(len(rewards), np.int64)
    found, _ = get_adv_estimator_fn(case.verl)(by_token, torch.ones_like(by_token), index, **case.settings)
    return found[:, 0].numpy()


def largest_differences(case: Case, num_groups: int) -> tuple[float, float]:
    """Of the estimator in float64, and of the float32 advantages that a run trains with."""
    exact = rounded = 0.0
    for rewards in random_groups(num_groups):
        theirs = verls(case, rewards)
        exact = max(exact, float(np.abs(ADVANTAGES[case.estimator](rewards) - theirs).max()))
        ours = group_advantages(rewards.tolist(), case.estimator)
        rounded = max(rounded, float(np.abs(ours - theirs).max()))
    return exact, rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=2000)
    num_groups = parser.parse_args().groups
    print("| loss.advantage | verl's | float64 | allowed | as trained (float32) |")
    print("|---|---|---|---|---|")
    failures = 0
    for case in CASES:
        exact, rounded = largest_differences(case, num_groups)
        failures += exact > case.allowed
        settings = "".join(f", {name}={value}" for name, value in case.settings.items())
        print(f"| {case.estimator} | {case.verl}{settings} | {exact:.1e} | {case.allowed:.0e} | {rounded:.1e} |")
    if failures:
        sys.exit(f"{failures} rows differ by more than is allowed")


if __name__ == "__main__":
    main()
