"""Prints the rehearsal of a rank."""

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from minpro_megatron.rehearsal.record import Phase, RankRehearsal

_GB, _MB = 1e9, 1e6
_LINES_OF_PEAK = {"cuda": 6, "cpu": 3}


def print_rehearsal(console: Console, found: RankRehearsal) -> None:
    """Problems, memory by phase, the comparison with the planner, collectives and host synchronizations."""
    console.print(f"{found.recipe}, rank {found.rank} ({found.place})", markup=False)
    _print_phases(console, found)
    _print_components(console, found)
    _print_collectives(console, found)
    _print_host_reads(console, found)
    console.print(f"problems: {len(found.problems) or 'none'}")
    for problem in found.problems:
        console.print(f"  {problem}", markup=False)
    console.print(f"This rehearsal took {found.seconds:.0f} s and {found.process_peak_bytes / _GB:.1f} GB.")


def _table(*columns: str, numbers: int) -> Table:
    """`numbers`: of the last columns, which are aligned to the right."""
    table = Table(box=SIMPLE)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place >= len(columns) - numbers else "left")
    return table


def _gb(size: int) -> str:
    return f"{size / _GB:.3f}"


def _print_phases(console: Console, found: RankRehearsal) -> None:
    table = _table("phase", "device peak GB", "at its end", "host peak GB", "operators", numbers=4)
    for phase in found.phases:
        peaks = (_gb(phase.peak.get("cuda", 0)), _gb(phase.left.get("cuda", 0)), _gb(phase.peak.get("cpu", 0)))
        table.add_row(phase.name, *peaks, f"{phase.operators:,}")
    console.print(table)
    for phase in (phase for phase in found.phases if " > " not in phase.name):
        for device, most in _LINES_OF_PEAK.items():
            _print_lines(console, phase, device, most)


def _print_lines(console: Console, phase: Phase, device: str, most: int) -> None:
    lines = [(line, size) for line, size in phase.peak_lines.get(device, [])[:most] if size >= _MB]
    if lines:
        where = "device" if device == "cuda" else "host"
        console.print(f"at the peak of {phase.name} on the {where}, GB by the line that allocated:")
    for line, size in lines:
        console.print(f"  {_gb(size)}  {line}", markup=False)


def _print_components(console: Console, found: RankRehearsal) -> None:
    table = _table("memory, GB", "rehearsed", "planned", "error", numbers=3)
    for one in found.components:
        error = "" if one.error is None else f"{one.error:+.1%}"
        table.add_row(one.name, _gb(one.measured), _gb(one.planned), error)
    console.print(table)


def _print_collectives(console: Console, found: RankRehearsal) -> None:
    table = _table("phase", "collective", "group", "by", "device", "dtype", "MB", "times", numbers=2)
    for one in sorted(found.collectives, key=lambda one: (one.phase, -one.num_bytes * one.count)):
        size = f"{one.num_bytes / _MB:,.3f}"
        table.add_row(one.phase, one.name, one.group, one.backend, one.device, one.dtype, size, f"{one.count:,}")
    console.print(table)


def _print_host_reads(console: Console, found: RankRehearsal) -> None:
    table = _table("phase", "the host waits for", "at", "times", numbers=1)
    for one in sorted(found.host_reads, key=lambda one: (one.phase, -one.count)):
        table.add_row(one.phase, one.kind, one.line.replace("[", "\\["), f"{one.count:,}")
    console.print(table)
