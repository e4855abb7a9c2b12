"""benchmarks/stability_study.md: tables and pictures from the stored curves, between two marks; other text is kept."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.stability_study.analysis import (
    COLLAPSE_SHARE,
    CONFIDENCE,
    FINAL_EVALUATIONS,
    Mean,
    collapse,
    final_accuracy,
    mean_of_column,
    mean_over_seeds,
    paired,
    peak_accuracy,
)
from benchmarks.stability_study.curves import StoredRun, read_stored
from benchmarks.stability_study.figures import write_figures
from benchmarks.stability_study.grid import (
    DELAYS,
    OBJECTIVES,
    ON_POLICY_MARGIN,
    STALENESS_LOSS,
    SWEPT_DELAYS,
    sweep_keys,
    sweep_table,
)
from benchmarks.stability_study.work import stored
from minpro_megatron.files.replacement import replace_file

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
PICTURES = {
    "final.png": "Final held-out accuracy: a dot for each seed, lines are means",
    "heldout.png": "Held-out accuracy against global steps: thin lines are seeds, thick ones means",
    "reward.png": "Training reward against global steps, running mean of five steps",
    "entropy.png": "Entropy of the policy at response tokens",
    "clipped.png": "Share of the tokens whose weight was clipped, or that were left out (none: drawn at 1e-5)",
}


def write_report(results: Path, learning_rate: float, folder: Path) -> None:
    """Rewrites the tables in `folder`.md and the pictures in `folder`. Raises ValueError if no run is stored."""
    runs = study_runs(results, learning_rate)
    if not runs:
        raise ValueError(f"{results}: no run at the rate {learning_rate:g} is stored; run the stage `run` first")
    swept = {key: final_accuracy(run) for key, run in stored(results, sweep_keys()).items()}
    parts = [_sweep(sweep_table(swept), learning_rate), *tables(runs)]
    parts += [f"![{title}](stability_study/{name})\n\n*{title}.*" for name, title in PICTURES.items()]
    path = folder.with_suffix(".md")
    replace_file(path, with_tables(path.read_text(encoding="utf-8"), "\n\n".join(parts)))
    write_figures(runs, folder)
    print(f"wrote {path} and {len(PICTURES)} pictures from {len(runs)} runs")


def study_runs(results: Path, learning_rate: float) -> list[StoredRun]:
    """All stored runs of the study at this rate, whatever their seeds, in the order of objectives, delays, seeds."""
    swept = set(sweep_keys())
    runs = [read_stored(path) for path in sorted(results.glob("*.jsonl"))]
    chosen = [run for run in runs if run.key not in swept and run.key.learning_rate == learning_rate]
    return sorted(chosen, key=lambda run: (OBJECTIVES.index(run.key.objective), run.key.delay_steps, run.key.seed))


def with_tables(text: str, tables: str) -> str:
    """`text` with `tables` between its marks. Raises ValueError if it does not have both, once, in order."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f"stability_study.md: the marks {BEGIN} and {END} must each stand in it once, in this order")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def tables(runs: Sequence[StoredRun]) -> list[str]:
    num_seeds = len({run.key.seed for run in runs})
    return [
        f"### Final and peak accuracy ({len(runs)} runs, {num_seeds} seeds)\n\n"
        f"Held-out accuracy, mean ± standard error over seeds. Final: the mean of the last {FINAL_EVALUATIONS} "
        "evaluations of a run; peak: the largest one.\n\n" + _accuracies(runs),
        "### Collapse\n\nSeeds that collapsed, of all, and at which global step: the first evaluated version from "
        f"which on the held-out accuracy stays below {COLLAPSE_SHARE:g} times its largest value before.\n\n"
        + _collapses(runs),
        f"### MinPRO less each other objective, final accuracy\n\nMean of the differences seed by seed with its "
        f"{CONFIDENCE:.0%} interval (Student's t); bold where the interval excludes 0. No correction for the number "
        "of comparisons.\n\n" + _differences(runs, final_accuracy),
        "### The same for the mean of a run's held-out accuracies (speed and stability together)\n\n"
        + _differences(runs, mean_accuracy),
        *[_diagnostics(runs, delay) for delay in DELAYS],
    ]


def mean_accuracy(run: StoredRun) -> float:
    """Over all evaluations of the run; 0 for those missing because the run ended early."""
    return math.fsum(run.heldout) / (len(run.heldout) if not run.given_up else _num_evaluations(run))


def _num_evaluations(run: StoredRun) -> int:
    every = run.versions[1] - run.versions[0] if len(run.versions) > 1 else run.num_steps
    return 1 + -(-run.num_steps // every)


def _of(runs: Sequence[StoredRun], objective: str, delay: int) -> list[StoredRun]:
    return [run for run in runs if run.key.objective == objective and run.key.delay_steps == delay]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _delay_names() -> list[str]:
    return [f"delay {delay}" if delay else "on-policy" for delay in DELAYS]


def _sweep(table: dict[float, tuple[float, float]], chosen: float) -> str:
    rows = [
        [f"**{rate:g}**" if rate == chosen else f"{rate:g}", *(f"{value:.3f}" for value in (*row, row[0] - row[1]))]
        for rate, row in table.items()
    ]
    names = ["learning rate", *(f"final accuracy, delay {delay}" for delay in SWEPT_DELAYS), "lost"]
    return (
        "### The learning rate\n\nMeans over GRPO and CISPO, one seed that the study does not have. Rule, fixed before "
        f"the sweep: the largest rate with on-policy accuracy within {ON_POLICY_MARGIN:g} of the best at which the "
        f"longest delay costs {STALENESS_LOSS:g} or more; if there is none, the rate within the margin that loses "
        "most.\n\n" + _table(names, rows)
    )


def _accuracies(runs: Sequence[StoredRun]) -> str:
    rows = []
    for objective in OBJECTIVES:
        row = [f"`{objective}`"]
        for measure in (final_accuracy, peak_accuracy):
            for delay in DELAYS:
                found = [measure(run) for run in _of(runs, objective, delay)]
                row.append(_shown(mean_over_seeds(found)) if found else "-")
        rows.append(row)
    names = [f"{kind}, {delay}" for kind in ("final", "peak") for delay in _delay_names()]
    return _table(["objective", *names], rows)


def _shown(mean: Mean) -> str:
    return f"{mean.value:.3f}" + (f" ± {mean.error:.3f}" if mean.count > 1 else "")


def _collapses(runs: Sequence[StoredRun]) -> str:
    rows = []
    for objective in OBJECTIVES:
        row = [f"`{objective}`"]
        for delay in DELAYS:
            found = [collapse(run) for run in _of(runs, objective, delay)]
            steps = sorted(step for step in found if step is not None)
            row.append(f"{len(steps)} of {len(found)}" + (f": {', '.join(map(str, steps))}" if steps else ""))
        rows.append(row)
    return _table(["objective", *_delay_names()], rows)


def _differences(runs: Sequence[StoredRun], measure: Callable[[StoredRun], float]) -> str:
    rows = []
    for objective in OBJECTIVES[1:]:
        row = [f"`{objective}`"]
        for delay in DELAYS:
            ours, theirs = (
                {run.key.seed: measure(run) for run in _of(runs, name, delay)} for name in (OBJECTIVES[0], objective)
            )
            row.append(_difference(paired(ours, theirs)) if ours.keys() & theirs.keys() else "-")
        rows.append(row)
    return _table(["minpro less", *_delay_names()], rows)


def _difference(mean: Mean) -> str:
    if mean.count < 2:
        return f"{mean.value:+.3f}"
    low, high = mean.value - mean.half_width, mean.value + mean.half_width
    text = f"{mean.value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"**{text}**" if mean.excludes_zero else text


def _diagnostics(runs: Sequence[StoredRun], delay: int) -> str:
    """Diagnostics of the runs of one delay."""
    rows = []
    for objective in OBJECTIVES:
        chosen = _of(runs, objective, delay)
        if not chosen:
            continue
        rows.append(
            [
                f"`{objective}`",
                f"{mean_over_seeds([run.columns['entropy'][-1] for run in chosen]).value:.3f}",
                *(_over_runs(chosen, name) for name in ("clipped", "masked", "effective_sample_size", "ratio_99")),
                *(_over_runs(chosen, name) for name in ("log_ratio_square", "prefix_min_mean", "grad_norm")),
                _over_runs(chosen, "truncated"),
            ]
        )
    head = ["objective", "entropy at the end", "clipped", "left out", "effective sample size", "99 % of the ratios"]
    head += ["squared log-ratio", "mean prefix minimum", "gradient norm", "truncated"]
    name = f"delay {delay}" if delay else "on-policy"
    return f"### Inside the runs, {name}\n\nMeans over the global steps and seeds.\n\n" + _table(head, rows)


def _over_runs(runs: Sequence[StoredRun], column: str) -> str:
    return f"{mean_over_seeds([mean_of_column(run, column) for run in runs]).value:.3g}"
