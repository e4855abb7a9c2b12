"""One line for each global step and evaluation, for the trainer's log."""

import math
from collections.abc import Mapping

_FIGURES = (
    ("reward", "reward/mean"), ("accuracy", "reward/accuracy"), ("loss", "objective/loss"),
    ("gradient norm", "optimizer/grad_norm"), ("entropy", "policy/entropy"), ("largest ratio", "ratio/max"),
    ("staleness", "staleness/max"),
)  # fmt: skip
_SECONDS = (
    ("waiting", "time/wait_for_batch_s"), ("scoring", "time/score_s"), ("training", "time/train_s"),
    ("publishing", "time/publish_s"), ("checkpoint", "time/checkpoint_s"),
    ("turn", "time/turn_s"),
)  # fmt: skip


def step_line(step: int, metrics: Mapping[str, float]) -> str:
    """The figures of a global step, and the seconds of its phases; metrics that are missing are excluded.

    >>> step_line(3, {"reward/mean": 0.5, "time/step_s": 1.25, "time/train_s": 1.0})
    'global step 3: reward 0.5; 1.25 s (training 1.00)'
    """
    figures = [f"{label} {metrics[name]:.4g}" for label, name in _FIGURES if name in metrics]
    phases = [f"{label} {metrics[name]:.2f}" for label, name in _SECONDS if metrics.get(name, 0.0) >= 0.005]
    total = metrics.get("time/step_s", math.nan)
    return f"global step {step}: {', '.join(figures)}; {total:.2f} s ({', '.join(phases)})"


def evaluation_line(version: int, benchmark: str, accuracy: float, standard_error: float) -> str:
    """The result of one evaluation.

    >>> evaluation_line(30, "", 0.5, 0.02)
    'policy version 30: held-out pass@1 50.0 % +- 2.0 %'
    """
    of = benchmark or "held-out"
    return f"policy version {version}: {of} pass@1 {100 * accuracy:.1f} % +- {100 * standard_error:.1f} %"
