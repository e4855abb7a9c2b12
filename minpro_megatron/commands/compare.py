"""Compares runs on one HTML page: overlaid curves, the results of each run, the settings in which they differ.

    minpro compare runs/demo runs/demo-cispo
    minpro compare runs/* --metrics eval/pass_at_1,ratio/max --smooth 5 --output study.html

Runs may have different lengths, and may still be active. If a run was resumed from a checkpoint, the steps after
resuming replace the earlier ones. The page needs no other file and loads nothing.
"""

import argparse
from pathlib import Path

from minpro_megatron.command_line import Parser, command_parser, count
from minpro_megatron.errors import run_reporting
from minpro_megatron.report.usual_metrics import USUAL_METRICS


def _page(text: str) -> Path:
    if not text.lower().endswith((".html", ".htm")):  # a typing error must not overwrite a file of a run
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a page; it must end in .html")
    return Path(text)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("there is no metric in it; give some, such as reward/accuracy,ratio/max")
    return list(dict.fromkeys(names))


def _parser(prog: str) -> Parser:
    parser = command_parser(__doc__, prog)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--output",
        type=_page,
        default=Path("comparison.html"),
        metavar="FILE.html",
        help="the page to write (default: comparison.html)",
    )
    parser.add_argument(
        "--metrics",
        type=_names,
        default=[],
        metavar="A,B",
        help=f"curves to draw (default: {', '.join(USUAL_METRICS)})",
    )
    parser.add_argument(
        "--smooth", type=count, metavar="N", help="running mean over N global steps, 1: none (default: a twentieth)"
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = "minpro compare") -> int:
    """0, or 2 after a message about a wrong option or run."""
    options = _parser(prog).parse_args(arguments)

    def compare() -> int:
        from minpro_megatron.report.comparison import read_runs, write_comparison  # imports matplotlib

        write_comparison(read_runs(options.runs), options.output, options.metrics, options.smooth)
        print(f"wrote {options.output}")
        return 0

    return run_reporting(compare, reads_given_files=True)
