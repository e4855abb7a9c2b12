"""Writes a run's report.html again from the contents of its folder: for a run that is active or ended early.

    minpro report runs/demo

A finished run already has its report, which is replaced.
"""

from pathlib import Path

from minpro_megatron.command_line import command_parser
from minpro_megatron.errors import UserError, run_reporting
from minpro_megatron.monitor.history import FILE_NAME as HISTORY_FILE


def _checked(run_dir: Path) -> Path:
    """Raises UserError if there is no run."""
    if not (run_dir / HISTORY_FILE).is_file():
        raise UserError(f"{run_dir}: no {HISTORY_FILE} in it, so it is not a run's folder, or the run has not started")
    return run_dir


def main(arguments: list[str] | None = None, prog: str = "minpro report") -> int:
    """0, or 2 after a message about a folder without a run."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's folder")
    options = parser.parse_args(arguments)

    def write() -> int:
        from minpro_megatron.report.report import write_report  # imports what makes its pages

        print(f"wrote {write_report(_checked(options.run_dir))}")
        return 0

    return run_reporting(write, reads_given_files=True)
