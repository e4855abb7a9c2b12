"""Run the checks of this project on one GPU: a few minutes of evidence that it works there.

    minpro gpu-check                                      # all of them; the record goes to benchmarks/
    minpro gpu-check --list
    minpro gpu-check --only log_probs attention --output /tmp/found
    minpro gpu-check --device cpu --small                 # only the logic of the checks, with small shapes

Each check is a process of its own with a time limit, and prints one JSON line with its figures and its verdict: passed,
failed, skipped or error. A check that crashes or hangs does not keep the next ones from running. Nothing is downloaded.
docs/gpu_checks.md says what each check shows, and what the machine must have.

Exit status: 0 if no check failed or if there is no GPU, 1 if one failed, 2 for a wrong command line or machine.
"""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from minpro_megatron.command_line import command_parser, positive
from minpro_megatron.errors import FAILED, SUCCEEDED, UserError, run_reporting
from minpro_megatron.gpu_checks.registry import BUDGET_S, CHECKS, Check, selected

_CHECKOUT = Path(__file__).resolve().parents[2]
RECORD_FOLDER = _CHECKOUT / "benchmarks"


def parse_arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
    parser.add_argument("--list", action="store_true", help="print the checks with their limits, and end")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these checks")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="small shapes, which take seconds on a CPU")
    parser.add_argument(
        "--budget",
        type=positive,
        metavar="SECONDS",
        help=f"of all checks together (default: {BUDGET_S:.0f}, or the sum of all limits with Transformer Engine); "
        "what does not fit is skipped",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write the record there as gpu_checks.json and gpu_checks.md (default: benchmarks/ of the checkout after "
        "a run of all checks at full size on a GPU, else no record)",
    )
    parser.add_argument("--commit", default="", metavar="TEXT", help="the commit, where the code is not a git checkout")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, prog: str = "minpro gpu-check") -> int:
    """0 if no check failed, 1 if one did, 2 after a message about a wrong option or what the machine lacks."""
    options = parse_arguments(arguments, prog)
    return run_reporting(lambda: _list() if options.list else _check(options))


def _list() -> int:
    # plain text: a machine that only runs the checks has no package for tables
    print(f"{'check':20}{'about s':>8}{'limit s':>9}  question")
    for check in CHECKS:
        only = " (with Transformer Engine)" if check.transformer_engine else ""
        print(f"{check.name:20}{check.expected_s:8.0f}{check.limit_s:9.0f}  {check.question}{only}")
    return SUCCEEDED


def _check(options: argparse.Namespace) -> int:
    from minpro_megatron.gpu_checks.pages import record_page
    from minpro_megatron.gpu_checks.record import Record, write_record
    from minpro_megatron.gpu_checks.runner import facts_of_machine, run_checks
    from minpro_megatron.launch.preflight.gpu_count import count_gpus
    from minpro_megatron.monitor.environment import git_commit

    checks = selected(options.only)
    if options.device == "cpu" and not options.small:
        raise UserError("--device cpu: full shapes would take hours there; add --small")
    if options.device == "cuda" and not count_gpus():
        print("gpu-check: there is no GPU here, so nothing was checked (--device cpu --small tries the checks' logic)")
        return SUCCEEDED
    machine = facts_of_machine()
    if missing := machine.pop("missing", ""):
        raise UserError(f"this machine lacks what the checks import: {missing}; see docs/gpu_checks.md")
    if options.device == "cuda" and not machine["GPU"]:
        raise UserError("torch sees no GPU although the driver does: install a torch with CUDA for this driver")
    fused = machine["Transformer Engine"] == "installed"
    results = run_checks(
        checks,
        options.device,
        options.small,
        options.budget or _budget(checks, fused),
        ended=lambda result: print(result.as_line(), flush=True),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = Record(now, options.commit or git_commit(_CHECKOUT), options.device, machine, results)
    complete = options.device == "cuda" and not options.small and not options.only
    folder = options.output or (RECORD_FOLDER if complete and RECORD_FOLDER.is_dir() else None)
    if folder is not None:
        write_record(folder, record, record_page(record))
        print(f"the record is in {folder}; python -m docs.generator brings it into the README", file=sys.stderr)
    broken = record.with_verdict("failed", "error")
    print(
        f"{len(record.passed)} of {len(results)} checks passed; failed: {', '.join(broken) or 'none'}", file=sys.stderr
    )
    return FAILED if broken else SUCCEEDED


def _budget(checks: list[Check], fused: bool) -> float:
    """Seconds: more than BUDGET_S only for the checks of Transformer Engine."""
    return BUDGET_S + (sum(check.limit_s for check in checks if check.transformer_engine) if fused else 0)
