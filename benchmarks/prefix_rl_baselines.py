"""PrefixRL beside supervised fine-tuning then RL, and plain RL, at equal sampled and trained tokens.

    .venv/bin/python -m benchmarks.prefix_rl_baselines [--seeds 0 1 2 3 4] [--record FILE.md]

All three start from the warm-started model of benchmarks.prefix_rl and use the same problems; PrefixRL and supervised
fine-tuning use the same traces, whose sampling costs both the same. Runs are made in runs/; complete ones are not
repeated, an interrupted one is resumed, so the command can be ended and run again. Every few global steps the accuracy
on held-out plain problems is measured. Runs are compared where they have used the same number of tokens: the largest
that all of them reach.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.prefix_rl import prepare
from benchmarks.trained_runs import ROOT, run_python
from minpro_megatron.recipes import prefix_rl

# Global steps: responses after a prefix are shorter, so a run on them needs more steps for as many tokens.
STEPS = {"plain": 24, "sft_then_rl": 24, "prefixed": 40}
EVALUATED_EVERY = 4
# REINFORCE without the standard deviation, as in the paper; all else is that of recipes/prefix_rl.py.
COMMON = [f"evaluation.every_steps={EVALUATED_EVERY}", "loss.advantage=group_mean"]


@dataclass(frozen=True)
class Point:
    """Held-out accuracy of a policy version, and the tokens that were sampled and trained on until then."""

    sampled: int
    trained: int
    accuracy: float


@dataclass(frozen=True)
class Curve:
    """A run's points in the order of training, and its accuracy on training prompts (first, last WINDOW steps)."""

    kind: str
    seed: int
    points: Sequence[Point]
    on_plain: tuple[float, float] | None
    on_prefixed: tuple[float, float] | None


WINDOW = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--record", type=Path, metavar="FILE.md", help="write the tables here too")
    options = parser.parse_args()
    prepare(prefix_rl.FOLDER)
    runs: dict[str, Callable[[int], Curve]] = {"plain": plain, "sft_then_rl": sft_then_rl, "prefixed": prefixed}
    curves = [run(seed) for seed in options.seeds for run in runs.values()]
    text = f"{tables(curves)}\n"
    print(f"\n{text}")
    if options.record:
        options.record.write_text(text)
    return 0


def plain(seed: int) -> Curve:
    folder = launch("plain", f"plain-{seed}", seed, STEPS["plain"])
    return curve("plain", seed, folder, 0)


def prefixed(seed: int) -> Curve:
    folder = launch("prefixed", f"prefixed-{seed}", seed, STEPS["prefixed"])
    return curve("prefixed", seed, folder, 0)


def sft_then_rl(seed: int) -> Curve:
    """Supervised fine-tuning, its export in both formats, and RL from there; its training tokens count."""
    supervised = launch("supervised", f"sft-{seed}", seed, prefix_rl.supervised().num_global_steps, of_rl=False)
    hf, megatron = supervised / "hf_export", prefix_rl.FOLDER / "after_sft" / f"megatron-{seed}"
    if not (megatron / "manifest.json").exists():
        run_python("tools/convert_checkpoint.py", "to-megatron", "--hf", hf, "--output", megatron)
    paths = [f"model.hf_path={hf}", f"model.megatron_path={megatron}"]
    folder = launch("after_supervised", f"sft-then-rl-{seed}", seed, STEPS["sft_then_rl"], *paths)
    return curve("sft_then_rl", seed, folder, sum(tokens for _, tokens in tokens_by_step(supervised)))


def launch(recipe: str, name: str, seed: int, num_steps: int, *settings: str, of_rl: bool = True) -> Path:
    """The folder of the complete run."""
    name = f"prefix-rl-baselines-{name}"
    folder = ROOT / "runs" / name
    if not (folder / "summary.json").exists():
        given = [f"name={name}", f"seed={seed}", f"num_global_steps={num_steps}", *(COMMON if of_rl else []), *settings]
        run_python("-m", "minpro_megatron", "launch", f"recipes.prefix_rl:{recipe}", *given)
    return folder


def tokens_by_step(folder: Path) -> list[tuple[int, int]]:
    """(sampled, trained tokens) of each global step: response tokens, and prompt and response tokens."""
    num_responses = _responses()
    return [
        (round(metrics.get("response/length_mean", 0.0) * num_responses), round(metrics["batch/tokens"]))
        for metrics in trained_steps(folder)
    ]


def _responses() -> int:
    batch = prefix_rl.prefixed().batch
    return batch.num_prompts * batch.responses_per_prompt


def trained_steps(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [metrics for metrics in lines if "objective/loss" in metrics]


def curve(kind: str, seed: int, folder: Path, trained_before: int) -> Curve:
    """What the run folder has. Version v exists after v global steps."""
    evaluated = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    steps = tokens_by_step(folder)
    points = [
        Point(
            sampled=sum(sampled for sampled, _ in steps[: one["policy_version"]]),
            trained=trained_before + sum(trained for _, trained in steps[: one["policy_version"]]),
            accuracy=one["pass_at_1"],
        )
        for one in sorted(evaluated, key=lambda one: one["policy_version"])
    ]
    found = trained_steps(folder)
    return Curve(
        kind,
        seed,
        points,
        ends(found, "reward/accuracy_by_prompt/plain"),
        ends(found, "reward/accuracy_by_prompt/prefixed"),
    )


def ends(steps: Sequence[Mapping[str, float]], name: str) -> tuple[float, float] | None:
    """Means over the first and the last WINDOW steps; a step may have no prompt of the kind."""
    found = [[step[name] for step in part if name in step] for part in (steps[:WINDOW], steps[-WINDOW:])]
    return (fmean(found[0]), fmean(found[1])) if all(found) else None


def accuracy_at(points: Sequence[tuple[int, float]], tokens: int) -> float:
    """The accuracy after so many tokens, between two measurements on the straight line that joins them. Raises
    ValueError if the points do not reach as far."""
    for (before, low), (after, high) in pairwise(points):
        if before <= tokens <= after:
            return low + (high - low) * (tokens - before) / (after - before)
    raise ValueError(f"{tokens} tokens: the run has {points[0][0]} to {points[-1][0]}")


def at_equal_tokens(curves: Sequence[Curve], of: Callable[[Point], int]) -> tuple[int, dict[str, dict[int, float]]]:
    """(tokens, accuracies by kind and seed), where all runs have used that many; `of` says which tokens count."""
    tokens = min(of(one.points[-1]) for one in curves)
    found: dict[str, dict[int, float]] = {}
    for one in curves:
        points = [(of(point), point.accuracy) for point in one.points]
        found.setdefault(one.kind, {})[one.seed] = accuracy_at(points, tokens)
    return tokens, found


def tables(curves: Sequence[Curve]) -> str:
    parts = [_seeds(curves)]
    for name, of in (("sampled", lambda point: point.sampled), ("trained", lambda point: point.trained)):
        tokens, found = at_equal_tokens(curves, of)
        lines = [f"| at {tokens:,} {name} tokens | mean accuracy | standard error over seeds | less plain |"]
        lines += ["|---|---|---|---|"]
        for kind, by_seed in found.items():
            differences = [by_seed[seed] - found["plain"][seed] for seed in by_seed]
            lines.append(f"| {kind} | {fmean(by_seed.values()):.3f} | {_error([*by_seed.values()])} | "
                         f"{fmean(differences):+.3f} ± {_error(differences)} |")  # fmt: skip
        pairs = [found["prefixed"][seed] - found["sft_then_rl"][seed] for seed in found["prefixed"]]
        lines.append(f"\nprefixed less sft_then_rl: {fmean(pairs):+.3f} ± {_error(pairs)}, {len(pairs)} seeds.")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _seeds(curves: Sequence[Curve]) -> str:
    lines = [
        "| seed | kind | held-out, plain problems | on plain training prompts | on prefixed ones | sampled tokens | "
        "trained tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in curves:
        shown = [f"{ends[0]:.3f} → {ends[1]:.3f}" if ends else "-" for ends in (one.on_plain, one.on_prefixed)]
        held_out = f"{one.points[0].accuracy:.3f} → {one.points[-1].accuracy:.3f}"
        last = one.points[-1]
        lines.append(f"| {one.seed} | {one.kind} | {held_out} | {shown[0]} | {shown[1]} | {last.sampled:,} | "
                     f"{last.trained:,} |")  # fmt: skip
    return "\n".join(lines)


def _error(values: Sequence[float]) -> str:
    return f"{stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else "-"


if __name__ == "__main__":
    sys.exit(main())
