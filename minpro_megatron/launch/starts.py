"""The starts of a run: `run_dir/starts/<incarnation>/`, created at the start of the run, read by all of its nodes.

A folder is created by one process only, on any file system (mkdir fails if it exists), so no lock is needed. Its files
are created atomically and never changed: a node finds a complete file or none.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from minpro_megatron.files.replacement import replace_file
from minpro_megatron.launch.preflight.problems import Problem
from minpro_megatron.run_folder.early_end import STARTS

POLL_S = 0.2
PLAN = "plan.json"
_REPORT, _VERDICT, _DONE, _FAILED = (
    "report-{}.json",
    "verdict.json",
    "done-{}.json",
    "failed-{}.json",
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The first node's plan for the others. `key` names this start of the job; with `problems` nothing will start."""

    key: str
    problems: list[Problem] = []
    is_finished: bool = False  # the run has already finished: nothing starts, which is not a failure
    policy_version: int = 0  # of the checkpoint from which this start resumes; 0: the start begins the run
    address: str = ""  # of the first node
    rendezvous_ports: list[
        int
    ] = []  # rendezvous ports of the trainer's nodes on the first node: for the check, for training


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A node's report on itself; clock_s: seconds by which its clock is ahead of the file system's."""

    node: int
    host: str
    clock_s: float = 0.0
    problems: list[Problem] = []


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The first node's decision: the roles start if there are no problems."""

    problems: list[Problem] = []


class NodeEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a node's roles; for a failure, `why` is its reason in one line."""

    host: str
    why: str = ""


def slurm_key(job_id: str, restarts: str | int) -> str:
    """The key of a start of a Slurm job that has been restarted so many times."""
    return f"slurm-{job_id}-{restarts}"


class Start:
    """One start of a run. Each of its files is written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.incarnation = int(folder.name)

    def write_plan(self, plan: Plan) -> None:
        self._write(PLAN, plan)

    def read_plan(self) -> Plan | None:
        return self._read(PLAN, Plan)

    def write_report(self, report: Report) -> None:
        self._write(_REPORT.format(report.node), report)

    def reports(self, num_nodes: int) -> list[Report]:
        """The reports that exist so far, in the order of the nodes."""
        found = (self._read(_REPORT.format(node), Report) for node in range(num_nodes))
        return [report for report in found if report is not None]

    def write_verdict(self, verdict: Verdict) -> None:
        self._write(_VERDICT, verdict)

    def read_verdict(self) -> Verdict | None:
        return self._read(_VERDICT, Verdict)

    def write_done(self, node: int, host: str) -> None:
        self._write(_DONE.format(node), NodeEnd(host=host))

    def are_done(self, nodes: list[int]) -> bool:
        return all((self._folder / _DONE.format(node)).exists() for node in nodes)

    def write_failed(self, node: int, host: str, why: str) -> None:
        self._write(_FAILED.format(node), NodeEnd(host=host, why=why))

    def failed(self, num_nodes: int) -> dict[int, NodeEnd]:
        """The nodes that have failed so far."""
        found = {node: self._read(_FAILED.format(node), NodeEnd) for node in range(num_nodes)}
        return {node: end for node, end in found.items() if end is not None}

    def clock_ahead_s(self, node: int) -> float:
        """Seconds by which this machine's clock is ahead of the file system's, by the time of a new file."""
        probe = self._folder / f"clock-{node}"
        before = time.time()
        probe.write_text("")
        ahead = (before + time.time()) / 2 - probe.stat().st_mtime
        probe.unlink()
        return ahead

    def _write(self, name: str, content: msgspec.Struct) -> None:
        replace_file(self._folder / name, msgspec.json.encode(content).decode() + "\n")

    def _read[T](self, name: str, kind: type[T]) -> T | None:
        try:
            return msgspec.json.decode((self._folder / name).read_bytes(), type=kind)
        except FileNotFoundError:
            return None


def begin_start(run_dir: Path) -> Start:
    """The next start of the run, numbered from 0; concurrent callers get different ones."""
    starts = run_dir / STARTS
    starts.mkdir(parents=True, exist_ok=True)
    number = max(_numbers(starts), default=-1) + 1
    while True:
        try:
            (starts / str(number)).mkdir()
        except FileExistsError:
            number += 1
        else:
            return Start(starts / str(number))


def find_start(run_dir: Path, key: str) -> tuple[Start, Plan] | None:
    """The start whose plan has this `key`; None while there is none."""
    starts = run_dir / STARTS
    for number in sorted(_numbers(starts), reverse=True):
        start = Start(starts / str(number))
        plan = start.read_plan()
        if plan is not None and plan.key == key:
            return start, plan
    return None


def starts_of_job(run_dir: Path, job: str) -> list[tuple[Start, Plan]]:
    """The starts whose key is `job` and a number, in their order, if their roles were started."""
    found = []
    for number in sorted(_numbers(run_dir / STARTS)):
        start = Start(run_dir / STARTS / str(number))
        plan, verdict = start.read_plan(), start.read_verdict()
        if plan is not None and plan.key.rpartition("-")[0] == job and verdict is not None and not verdict.problems:
            found.append((start, plan))
    return found


def wait_for[T](look: Callable[[], T | None], limit_s: float, poll_s: float = POLL_S) -> T | None:
    """The first result of `look` other than None within `limit_s` seconds, else None. It is called every `poll_s`."""
    deadline = time.monotonic() + limit_s
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(poll_s)
    return found


def _numbers(starts: Path) -> Iterator[int]:
    if starts.is_dir():
        yield from (int(path.name) for path in starts.iterdir() if path.name.isdecimal())
