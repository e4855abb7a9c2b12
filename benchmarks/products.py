"""Does a policy learn to use a tool for what it cannot do alone? recipes/products.py with several seeds.

    .venv/bin/python -m benchmarks.products [--seeds 0 1 2]

Makes the warm-started model in artifacts/products if it is missing, runs the recipe with the calculator and without it
with each seed (a complete run is not repeated, an interrupted one is resumed), prints a Markdown table and draws the
curves (benchmarks/products.png).
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.trained_runs import make_model, trained_run
from minpro_megatron.recipes import products
from minpro_megatron.report.figures import STYLE

KINDS = {"with_tool": "calculator", "without_tool": "none"}  # functions of recipes.products
PICTURE = Path(__file__).with_suffix(".png")
_NO_DATE: Any = {"Software": None}
WINDOW = 5  # global steps at the run's beginning and end


@dataclass(frozen=True)
class Run:
    """The results of a run, as fractions; `calls` are tool calls per training response at both ends of the run."""

    kind: str
    seed: int
    versions: list[int]
    accuracy: list[float]  # of each evaluated version on held-out prompts
    errors: list[float]
    calls: tuple[float, float]
    equal_groups: float  # over the whole run


def run(kind: str, seed: int) -> Run:
    trained, evaluated = trained_run(f"recipes.products:{kind}", f"products-{kind}-{seed}", f"seed={seed}")
    calls = [metrics.get("episode/tool_calls", 0.0) for metrics in trained]
    return Run(
        kind,
        seed,
        [one["policy_version"] for one in evaluated],
        [one["pass_at_1"] for one in evaluated],
        [one["standard_error"] for one in evaluated],
        (fmean(calls[:WINDOW]), fmean(calls[-WINDOW:])),
        fmean(metrics["reward/equal_groups"] for metrics in trained),
    )


def table(runs: list[Run]) -> str:
    lines = [
        "| seed | environment | held-out pass@1 before | after | calls per response | groups without gradient |",
        "|---|---|---|---|---|---|",
    ]
    for one in sorted(runs, key=lambda one: (list(KINDS).index(one.kind), one.seed)):
        ends = [f"{one.accuracy[end]:.3f} ± {one.errors[end]:.3f}" for end in (0, -1)]
        calls = f"{one.calls[0]:.2f} → {one.calls[1]:.2f}" if one.kind == "with_tool" else "-"
        lines.append(f"| {one.seed} | {KINDS[one.kind]} | {ends[0]} | {ends[1]} | {calls} | {one.equal_groups:.2f} |")
    return "\n".join(lines)


def account(runs: list[Run]) -> str:
    """Both ends of the curve for both kinds, with standard errors over the seeds."""
    parts = []
    for kind, name in KINDS.items():
        ends = [_mean_and_error([one.accuracy[end] for one in runs if one.kind == kind]) for end in (0, -1)]
        parts.append(f"environment {name} {ends[0]} before, {ends[1]} after")
    return f"Means over the seeds, ± standard error over them: {'; '.join(parts)}."


def _mean_and_error(values: list[float]) -> str:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{fmean(values):.3f} ± {error:.3f}"


def draw(runs: list[Run], path: Path) -> None:
    """The held-out accuracy of every run over its global steps."""
    colors = {"with_tool": "#2563eb", "without_tool": "#dc2626"}
    with mpl.rc_context(STYLE | {"font.size": 8}):
        figure = Figure(figsize=(6, 3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for one in runs:
            label = f"environment: {KINDS[one.kind]}" if one.seed == runs[0].seed else None
            axes.errorbar(
                one.versions, one.accuracy, one.errors, color=colors[one.kind], capsize=2, lw=1.2, label=label
            )
        axes.set(xlabel="global step", ylabel="held-out pass@1", ylim=(-0.03, 1.03))
        axes.legend(frameon=False, loc="center right")
        figure.savefig(path, dpi=100, metadata=_NO_DATE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    make_model("products", products.FOLDER)
    runs = [run(kind, seed) for seed in options.seeds for kind in KINDS]
    print(f"\n{table(runs)}\n\n{account(runs)}")
    draw(runs, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
