"""MinPRO and eight other objectives on responses that are many updates old: the study of stability_study.md.

    nice -n 15 .venv/bin/python -m benchmarks.stability_study run   # hours; start it again to resume
    .venv/bin/python -m benchmarks.stability_study status
    .venv/bin/python -m benchmarks.stability_study merge OTHER.jsonl ...
    .venv/bin/python -m benchmarks.stability_study repeat NUMBER ...
    .venv/bin/python -m benchmarks.stability_study report

run: the learning rates are selected, then every objective, delay and seed is run, by the protocol in
stability_study/protocol.md; one thread for each process, and several processes may share a record. merge: adds the runs
of other records. repeat: does the runs of these lines of the record again (the first is 1) and compares every digit.
report: writes the results, from the record alone, into stability_study.md.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.stability_study.grid import NUM_STUDY_RUNS, OBJECTIVES
from benchmarks.stability_study.record import as_line, merge, read_record
from benchmarks.stability_study.report import write_report
from benchmarks.stability_study.trial import TrialSettings
from benchmarks.stability_study.warm_start import initial_weights
from benchmarks.stability_study.work import chosen_rates, missing_keys, repeated, run_missing

FOLDER = Path(__file__).resolve().parent
NEEDED = {"merge": "merge needs the files to add", "repeat": "repeat needs numbers of lines"}
STAGES = ("run", "status", "merge", "repeat", "report")


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def status(path: Path) -> str:
    record = read_record(path)
    num_selection = sum(key.stage == "selection" for key in record)
    return (
        f"{path}: {num_selection} runs of the selection, which is complete for {len(chosen_rates(record))} of "
        f"{len(OBJECTIVES)} objectives; {len(record) - num_selection} of {NUM_STUDY_RUNS} runs of the study; next: "
        f"{next((key.name for key in missing_keys(record)), 'nothing, the record is complete')}"
    )


def _repeated(path: Path, number: str) -> int:
    """0 if that line of the record is got again, else 1."""
    trials = list(read_record(path).values())
    if not number.isdecimal() or not 1 <= int(number) <= len(trials):
        raise ValueError(f"{number}: give the number of a line of {path}, 1 to {len(trials)}")
    trial = trials[int(number) - 1]
    same = as_line(repeated(trial, initial_weights(), TrialSettings())) == as_line(trial)
    say(f"{trial.key.name}: {'the same' if same else 'ANOTHER'} result as in the record, made with {trial.machine}")
    return 0 if same else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("inputs", nargs="*", help="of merge: the records to add; of repeat: numbers of lines")
    parser.add_argument("--record", type=Path, default=FOLDER / "results.jsonl", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if bool(options.inputs) != (options.stage in NEEDED):
        parser.error(NEEDED.get(options.stage, f"{options.stage} takes no further words"))
    torch.set_num_threads(1)
    try:
        if options.stage == "run":
            run_missing(options.record, initial_weights(), TrialSettings(), say)
        if options.stage == "merge":
            print(f"{merge(options.record, [Path(name) for name in options.inputs])} runs added")
        if options.stage == "repeat":
            return max(_repeated(options.record, number) for number in options.inputs)
        if options.stage == "report":
            write_report(options.record, FOLDER)
        print(status(options.record))
    except ValueError as error:
        print(f"stability_study: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
