"""Does training on prefixed problems raise the accuracy without prefixes? recipes/prefix_rl.py with several seeds.

    .venv/bin/python -m benchmarks.prefix_rl [--seeds 0 1 2] [--learning-rate 2e-4]

Makes the warm-started model and its prompts in artifacts/prefix_rl if they are missing, runs both recipes with
each seed (a complete run is not repeated, an interrupted one is resumed) and prints a Markdown table.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.trained_runs import make_model, run_python, trained_run
from minpro_megatron.recipes import prefix_rl

KINDS = ("plain", "prefixed")  # functions of recipes.prefix_rl
WINDOW = 10  # global steps at the run's beginning and end


@dataclass(frozen=True)
class Run:
    """The results of a run, as fractions; curves are means over the first and the last WINDOW global steps."""

    kind: str
    seed: int
    before: float
    before_error: float
    after: float
    after_error: float
    plain_curve: tuple[float, float]
    prefixed_curve: tuple[float, float] | None
    equal_groups: float  # over the whole run
    response_tokens: int


def prepare(folder: Path) -> None:
    """Makes the model in both forms and the training prompts if they are missing."""
    hf = make_model("calculator_steps", folder)
    if not (folder / "demonstrations.jsonl").exists():
        config = prefix_rl.prefixed()
        files = ["--prompts", "recipes/data/calculator_steps_train.jsonl", "--output", folder / "prefixed.jsonl"]
        files += ["--plain-output", folder / "plain.jsonl", "--demonstrations", folder / "demonstrations.jsonl"]
        sampling = ["--max-samples", 32, "--reward", config.reward.function, "--engine", "reference"]
        sampling += ["--max-prompt-tokens", config.sampling.max_prompt_tokens]
        sampling += ["--max-response-tokens", config.sampling.max_response_tokens]
        run_python("tools/build_prefixes.py", "--model", hf, *files, *sampling)


def run(kind: str, seed: int, learning_rate: float) -> Run:
    name = f"prefix-rl-{kind}-{seed}-{learning_rate:g}"
    settings = (f"seed={seed}", f"optimizer.learning_rate={learning_rate}")
    trained, evaluated = trained_run(f"recipes.prefix_rl:{kind}", name, *settings)
    first, last = evaluated[0], evaluated[-1]
    plain = _curve(trained, "reward/accuracy_by_prompt/plain")
    assert plain is not None
    return Run(
        kind,
        seed,
        first["pass_at_1"],
        first["standard_error"],
        last["pass_at_1"],
        last["standard_error"],
        plain,
        _curve(trained, "reward/accuracy_by_prompt/prefixed"),
        fmean(metrics["reward/equal_groups"] for metrics in trained),
        round(sum(metrics["response/length_mean"] * _responses() for metrics in trained)),
    )


def _responses() -> int:
    batch = prefix_rl.prefixed().batch
    return batch.num_prompts * batch.responses_per_prompt


def _curve(steps: list[dict[str, float]], name: str) -> tuple[float, float] | None:
    """Means over the first and the last WINDOW steps; a step may have no prompt of the kind."""
    ends = [[step[name] for step in part if name in step] for part in (steps[:WINDOW], steps[-WINDOW:])]
    return (fmean(ends[0]), fmean(ends[1])) if all(ends) else None


def table(runs: list[Run]) -> str:
    lines = [
        "| seed | trained on | held-out pass@1 before | after | rise | training accuracy, plain prompts | prefixed "
        "prompts | groups without gradient | response tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(runs, key=lambda one: (one.seed, KINDS.index(one.kind))):
        curves = [f"{c[0]:.3f} → {c[1]:.3f}" if c else "-" for c in (one.plain_curve, one.prefixed_curve)]
        lines.append(
            f"| {one.seed} | {one.kind} | {one.before:.3f} ± {one.before_error:.3f} | {one.after:.3f} ± "
            f"{one.after_error:.3f} | {one.after - one.before:+.3f} | {curves[0]} | {curves[1]} | "
            f"{one.equal_groups:.2f} | {one.response_tokens:,} |"
        )
    return "\n".join(lines)


def account(runs: list[Run]) -> str:
    """The rises of both kinds, and their difference, seed by seed."""
    rise = {kind: {one.seed: one.after - one.before for one in runs if one.kind == kind} for kind in KINDS}
    differences = [rise["prefixed"][seed] - rise["plain"][seed] for seed in rise["plain"]]
    parts = [f"{kind} {fmean(rise[kind].values()):+.3f}" for kind in KINDS]
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return (
        f"Mean rise over {len(differences)} seeds: {', '.join(parts)}; "
        f"prefixed less plain {fmean(differences):+.3f} ± {error:.3f} (standard error over seeds)."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rate", type=float, default=prefix_rl.prefixed().optimizer.learning_rate)
    options = parser.parse_args()
    prepare(prefix_rl.FOLDER)
    runs = [run(kind, seed, options.learning_rate) for seed in options.seeds for kind in KINDS]
    print(f"\n{table(runs)}\n\n{account(runs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
