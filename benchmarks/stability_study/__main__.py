"""Does the prefix minimum keep training stable when rollouts are many updates old? The study behind stability_study.md.

    .venv/bin/python -m benchmarks.stability_study [--workers 2]            # all of it: hours on two cores
    .venv/bin/python -m benchmarks.stability_study sweep|run|report

sweep: the learning rate, by the rule in grid.py. run: every objective x delay x seed at that rate. report: table,
pictures and differences in benchmarks/stability_study.md, only from the stored curves. A stored run is not repeated;
an interrupted one starts again and gives the same curves.
"""

import argparse
import sys
from pathlib import Path

from benchmarks.stability_study.analysis import final_accuracy
from benchmarks.stability_study.grid import SEEDS, choose_rate, study_keys, sweep_keys, sweep_table
from benchmarks.stability_study.prepare import fingerprint, prepare
from benchmarks.stability_study.report import write_report
from benchmarks.stability_study.work import run_missing, stored

FOLDER = Path(__file__).resolve().parent
STAGES = ("sweep", "run", "report")


def chosen_rate(results: Path) -> float:
    """The learning rate, from the stored runs of the sweep. Raises ValueError if some are missing."""
    keys = sweep_keys()
    found = stored(results, keys)
    if missing := [key.name for key in keys if key not in found]:
        raise ValueError(
            f"{results}: {len(missing)} runs of the sweep are missing, first {missing[0]}; run sweep first"
        )
    return choose_rate(sweep_table({key: final_accuracy(run) for key, run in found.items()}))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="stage", help="sweep, run, report (all)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each (2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of `run`")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the stored curves")
    parser.add_argument("--runs-dir", type=Path, default=FOLDER.parents[1] / "runs" / "stability_study")
    options = parser.parse_args(arguments)
    stages = options.stages or list(STAGES)
    if unknown := sorted(set(stages) - set(STAGES)):
        parser.error(f"{unknown[0]!r} is no stage; known: {', '.join(STAGES)}")
    num_failed = 0
    try:
        if {"sweep", "run"} & set(stages):
            prepare()
            inputs = fingerprint()
            work = options.results, options.runs_dir, inputs, options.workers
            if "sweep" in stages:
                num_failed += run_missing(sweep_keys(), *work)
            if "run" in stages and not num_failed:
                rate = chosen_rate(options.results)
                print(f"learning rate {rate:g}", flush=True)
                num_failed += run_missing(study_keys(rate, options.seeds), *work)
        if "report" in stages and not num_failed:
            write_report(options.results, chosen_rate(options.results), FOLDER)
    except ValueError as error:
        print(f"stability_study: {error}", file=sys.stderr)
        return 1
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
