"""The results in stability_study.md, between its two markers, and all tables in tables.md: from the record alone.

While runs are missing, the page says how many there are and nothing about their results.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.stability_study.analysis import (
    Comparison,
    Record,
    by_seed,
    collapse,
    comparisons,
    mean_by_position,
    steps_to_collapse,
    variance_ratio,
    verdict,
)
from benchmarks.stability_study.grid import (
    COMMON_RATE,
    COMMON_STAGE,
    DELAYS,
    LONGEST,
    MAIN,
    NUM_STUDY_RUNS,
    OBJECTIVES,
    RATES,
)
from benchmarks.stability_study.measures import difference, paired
from benchmarks.stability_study.picture import write_picture
from benchmarks.stability_study.record import StoredTrial, primary_metric, read_record
from benchmarks.stability_study.work import chosen_rates, missing_keys, selection_means

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def write_report(path: Path, folder: Path) -> None:
    """Writes the results into `folder`.md; of a complete record also tables and picture into `folder`.

    Raises ValueError for runs of different setups, and for one that is none of the study's.
    """
    record = read_record(path)
    if len(setups := {trial.setup for trial in record.values()}) > 1:
        raise ValueError(f"{path} has runs of {len(setups)} setups, {', '.join(sorted(setups))}; keep one of them")
    page = folder.with_suffix(".md")
    if is_complete(record):
        write_picture(record, folder / "heldout.png")
        (folder / "tables.md").write_text(all_tables(record))
    text = results(record) if is_complete(record) else progress(record)
    before, rest = page.read_text().split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


def is_complete(record: Record) -> bool:
    return not missing_keys(record)


def progress(record: Record) -> str:
    num_study = sum(key.stage != "selection" for key in record)
    return (
        f"**{num_study} of {NUM_STUDY_RUNS} runs of the study are in the record**, and {len(record) - num_study} runs "
        f"of the selection of learning rates, which is complete for {len(chosen_rates(record))} of {len(OBJECTIVES)} "
        "objectives. No conclusion is drawn before all are there."
    )


def results(record: Record) -> str:
    """What a complete record says, on one screen."""
    compared = [one for one in comparisons(record) if one.family != "others"]
    caption = "Held-out accuracy against global steps: means over seeds, bands of one standard error"
    return "\n\n".join(
        [
            "MinPRO less another objective at the longest delay, in the primary metric; each has its own learning "
            f"rate, and {COMMON_RATE:g} in the family of the common rate:",
            _comparison_table(compared),
            "\n".join(f"- {line}" for line in _mechanism(record)),
            f"![{caption}](stability_study/heldout.png)",
            "Held-out accuracy of the last third, mean ± standard error over seeds; runs that collapsed, of all:",
            _accuracies(record),
            "All comparisons, the selection of the learning rates and the prefix minima by position: "
            "[tables](stability_study/tables.md).",
        ]
    )


def all_tables(record: Record) -> str:
    parts = [_rates(record), _comparisons(record), _positions(record), _machines(record)]
    return "# Tables of the stability study\n\n" + "\n\n".join(parts) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rates(record: Record) -> str:
    """The selection, which also shows how stable the objectives are at equal rates."""
    rates, rows = chosen_rates(record), []
    for objective in OBJECTIVES:
        found = selection_means(record, objective)
        cells = [f"**{rate:g}: {mean:.3f}**" if rate == rates[objective] else f"{rate:g}: {mean:.3f}"
                 for rate, mean in sorted(found.items())]  # fmt: skip
        common = [t for k, t in record.items() if (k.stage, k.objective) == ("selection", objective)
                  and k.learning_rate in RATES]  # fmt: skip
        num_collapsed = sum(collapse(trial) is not None for trial in common)
        mean = fmean(primary_metric(trial) for trial in common)
        rows.append([f"`{objective}`", ", ".join(cells), f"{mean:.3f}", f"{num_collapsed} of {len(common)}"])
    return (
        f"## Learning rates, delay {LONGEST}\n\nPrimary metric of the selection runs by rate, bold: chosen; its mean "
        "over the rates that all objectives have, and collapsed runs with those rates (described, not tested).\n\n"
        + table(["objective", "rate: metric", "mean", "collapsed"], rows)
    )


def _accuracies(record: Record) -> str:
    rows = []
    for objective in OBJECTIVES:
        cells = [_accuracy(record, objective, delay, "study") for delay in DELAYS]
        common = _accuracy(record, objective, LONGEST, COMMON_STAGE) if objective in MAIN else ""
        rows.append([f"`{objective}`", *cells, common])
    return table(["objective", *(f"delay {delay}" for delay in DELAYS), f"delay {LONGEST}, {COMMON_RATE:g}"], rows)


def _accuracy(record: Record, objective: str, delay: int, stage: str) -> str:
    values = difference(list(by_seed(record, objective, delay, stage=stage).values()))
    ended = [value for value in by_seed(record, objective, delay, _collapsed, stage).values() if value]
    return f"{values.mean:.3f} ± {values.error:.3f}; {len(ended)} of {values.count}"


def _collapsed(trial: StoredTrial) -> float:
    return float(collapse(trial) is not None)


def _comparisons(record: Record) -> str:
    return (
        "## MinPRO less each other objective\n\nPaired by seed. Intervals have 95 % for their family together "
        "(Bonferroni), p-values are adjusted within it (Holm).\n\n" + _comparison_table(comparisons(record))
    )


def _comparison_table(compared: Sequence[Comparison]) -> str:
    columns = ["family", "MinPRO less", "delay", "seeds", "difference", "interval", "p", "verdict"]
    return table(columns, [_comparison_row(one) for one in compared])


def _comparison_row(one: Comparison) -> list[str]:
    low, high = one.interval
    cells = [f"{one.difference.mean:+.3f}", f"[{low:+.3f}, {high:+.3f}]", f"{one.adjusted_p:.3g}", verdict(low, high)]
    return [one.family, f"`{one.objective}`", str(one.delay), str(one.difference.count), *cells]


def _mechanism(record: Record) -> list[str]:
    later = paired(*(by_seed(record, name, LONGEST, steps_to_collapse) for name in ("minpro", "cispo")))
    lines = [f"MinPRO's runs at delay {LONGEST} last {later.mean:+.1f} global steps longer than CISPO's until a "
             f"collapse or the end ({_interval(later.interval())})."]  # fmt: skip
    for name in ("scaled_cispo", "shuffled_minpro"):
        gain = paired(by_seed(record, name, LONGEST), by_seed(record, "cispo", LONGEST))
        lines.append(f"`{name}` less CISPO: {gain.mean:+.3f} ({_interval(gain.interval())}).")
    for name in ("minpro", "cispo"):
        ratio = variance_ratio(record, name)
        found = "not given, a run shows no mean gradient above its noise"
        if ratio is not None:
            bounds = tuple(math.exp(bound) for bound in ratio.interval())
            found = f"{math.exp(ratio.mean):.3f} ({_interval(bounds)})"
        lines.append(f"Relative variance of MinPRO's gradient over CISPO's, at the weights of `{name}`: {found}.")
    return lines


def _interval(bounds: tuple[float, ...]) -> str:
    return f"95 %: {bounds[0]:.3f} to {bounds[1]:.3f}"


def _positions(record: Record) -> str:
    """Whether the prefix minimum had length to act in MinPRO's runs."""
    rows = []
    for delay in DELAYS:
        chosen = [t for k, t in record.items() if (k.stage, k.objective, k.delay) == ("study", "minpro", delay)]
        minima, gaps = (mean_by_position(chosen, name) for name in ("prefix_min/mean", "prefix_ratio/gap_abs"))
        rows.append([str(delay), *(f"{minima[place]:.3f} / {gaps[place]:.3f}" for place in minima)])
    return (
        "## The prefix minimum by position\n\nMinPRO's runs: mean prefix minimum / mean distance of "
        "log(prefix minimum x ratio) from the logarithm of the product; columns are the first positions of buckets.\n\n"
        + table(["delay", *map(str, minima)], rows)
    )


def _machines(record: Record) -> str:
    counts = Counter(trial.machine for trial in record.values())
    return "## Machines\n\n" + table(
        ["machine", "runs"], [[name, str(count)] for name, count in sorted(counts.items())]
    )
