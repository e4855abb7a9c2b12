"""Runs one node's share of a run on several nodes; a cluster's job starts one such process on each node.

The first node prepares the run folder and writes a plan; every node checks itself and writes a report; the first node
writes its verdict; then the roles run. The nodes communicate through files (launch/starts.py). The program that started
the processes may end all of them as soon as one fails, as `srun --kill-on-bad-exit` does.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from minpro_megatron.checkpoints.resume_point import read_latest
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import (
    FAILED,
    SUCCEEDED,
    TO_BE_CONTINUED,
    TRY_AGAIN,
    WRONG_INPUT,
    ProjectError,
    TryAgainError,
    UserError,
)
from minpro_megatron.files.disk_space import naming_full_disk
from minpro_megatron.launch.finished import finish, finish_again, finish_despite_failure
from minpro_megatron.launch.job_status import state_exit_status
from minpro_megatron.launch.launcher import closing_lines, guarded_tick
from minpro_megatron.launch.node_roles import LOOPBACK, NodePlace, fabric_environment, node_commands, node_torchrun
from minpro_megatron.launch.preflight.node_checks import all_problems, node_name, node_problems, routable_address
from minpro_megatron.launch.preflight.problems import Problem, passes
from minpro_megatron.launch.preflight.run_checks import run_problems, warnings
from minpro_megatron.launch.recipe import read_config
from minpro_megatron.launch.resume import CONFIG_FILE, finished_summary
from minpro_megatron.launch.roles import NCCL_MEMORY, roles_of, trainer_environment
from minpro_megatron.launch.run_folder import claimed, first_lines, prepare
from minpro_megatron.launch.starts import (
    NodeEnd,
    Plan,
    Report,
    Start,
    Verdict,
    begin_start,
    find_start,
    starts_of_job,
    wait_for,
)
from minpro_megatron.launch.stopping import Stopping, save_by
from minpro_megatron.launch.supervisor import (
    Failure,
    Outcome,
    RoleCommand,
    Supervisor,
)
from minpro_megatron.launch.topology import Topology, read_topology
from minpro_megatron.monitor.progress import Progress
from minpro_megatron.run_folder.start_fence import StartFence, state_end
from minpro_megatron.serving.ports import free_ports
from minpro_megatron.terminal_text import visible

# Between the starts of two nodes: each may have to unpack a container image.
PLAN_LIMIT_S = REPORT_LIMIT_S = 600.0
TOLD_AFTER_S = 30.0
ALL_REDUCE_LIMIT_S = 180.0
OTHERS_END_S = 20.0  # time for the other nodes to end after an early end
NUM_STALLED_STARTS = 2  # number of consecutive ones after which a job is not started again
_LOOK_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """The options of the command `node`; those with a default of None come from Slurm's variables."""

    config: Path
    topology: Path
    start: str | None = None
    index: int | None = None
    interface: str = ""
    end_early_s: float = 0.0  # time before the job's end at which its processes get SIGTERM


class _OthersFailed(Exception):
    """Another node has failed; the message states which and why."""


def run_node(options: NodeOptions, environment: Mapping[str, str] = os.environ) -> int:
    """Runs this node's share to its end. Returns the exit status: 0 finished, 1 failed, 2 not started because of
    problems that a user has to solve, 69 not started because of a temporary state of a machine (a job is then started
    again), 75 saved before the job's end and to be started again, 130 stopped by a signal. Raises UserError and
    TryAgainError, which correspond to 2 and 69."""
    began = time.time()
    config = read_config(options.config)
    topology = read_topology(options.topology)
    index = _index(options, len(topology.nodes), environment)
    limit = save_by(config, environment, began, options.end_early_s)
    node = _Node(config, topology, index, _key(options, environment), options, limit, environment)
    try:
        status = node.run()
    except ProjectError as error:
        state_exit_status(error.exit_status, environment)
        raise
    state_exit_status(status, environment)
    return status


def _index(options: NodeOptions, num_nodes: int, environment: Mapping[str, str]) -> int:
    given = options.index if options.index is not None else int(environment.get("SLURM_NODEID", -1))
    if not 0 <= given < num_nodes:
        raise UserError(
            f"--index {given}: the topology has the nodes 0 to {num_nodes - 1}; give one, or start this with srun on "
            f"{num_nodes} nodes, one task each"
        )
    return given


def _key(options: NodeOptions, environment: Mapping[str, str]) -> str:
    if options.start:
        return options.start
    if "SLURM_JOB_ID" not in environment:
        raise UserError("--start is missing: give all nodes of this start the same new name")
    return f"slurm-{environment['SLURM_JOB_ID']}-{environment.get('SLURM_RESTART_COUNT', '0')}"


class _Node:
    """One node's part of a start."""

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        index: int,
        key: str,
        options: NodeOptions,
        limit: float | None,
        environment: Mapping[str, str],
    ) -> None:
        self._config, self._topology, self._index, self._key = config, topology, index, key
        self._environment, self._save_by, self._end_early_s = environment, limit, options.end_early_s
        self._host = environment.get("SLURMD_NODENAME") or socket.gethostname()
        self._share = topology.nodes[index]
        self._wanted_interface = options.interface
        self._address, self._interface, self._own_problems = LOOPBACK, "lo", list[Problem]()

    @property
    def _is_first(self) -> bool:
        return self._index == 0

    def run(self) -> int:
        if len(self._topology.nodes) > 1:
            try:
                self._address, self._interface = routable_address(self._wanted_interface)
            except UserError as error:
                self._own_problems = [Problem(str(error))]
        with ExitStack() as held:
            remedy = "choose another runs_dir=..."
            with naming_full_disk(self._config.run_dir, f"runs_dir = {self._config.runs_dir}", remedy):
                start, plan = self._make_plan(held) if self._is_first else self._find_plan()
            if plan.problems:
                return self._refuse(plan.problems)
            if plan.is_finished:
                return self._finish_again()
            verdict = self._check(start)
            if verdict.problems:
                return self._refuse(verdict.problems)
            return self._run_roles(start, plan)

    def _make_plan(self, held: ExitStack) -> tuple[Start, Plan]:
        """The part of a start that only the first node does: it checks the run and prepares the run folder."""
        try:
            start = begin_start(self._config.run_dir)
        except OSError as error:
            kind = TryAgainError if passes(error) else UserError
            raise kind(f"runs_dir = {self._config.runs_dir}: {error}; choose another runs_dir=...") from None
        ports: list[int] = []
        version = 0
        try:
            held.enter_context(claimed(self._config.run_dir))
            if finished_summary(self._config) is not None:
                plan = Plan(key=self._key, is_finished=True)
                start.write_plan(plan)
                return start, plan
            found = [Problem(line) for line in run_problems(self._config)]
            if not found:
                manifest = read_latest(self._config.run_dir)
                version = manifest.policy_version if manifest else 0
                found = [Problem(line) for line in self._stalled(version)]
            ports = free_ports(self._address, 2)
        except UserError as error:
            found = [Problem(line) for line in error.problems]
        except OSError as error:
            found = [Problem(f"{self._name}: {error}", passes(error))]
        if not found:
            _, goes_on = prepare(self._config, start.incarnation, self._say)
            lines = (f"warning: {warning}" for warning in warnings(self._config))
            self._say(*first_lines(self._config, start.incarnation, goes_on), *lines)
        plan = Plan(
            key=self._key, problems=found, policy_version=version, address=self._address, rendezvous_ports=ports
        )
        start.write_plan(plan)
        return start, plan

    def _finish_again(self) -> int:
        """All nodes succeed; the first one writes missing files and prints the run's results."""
        summary = finished_summary(self._config) if self._is_first else None
        return SUCCEEDED if summary is None else finish_again(self._config, summary)

    def _stalled(self, version: int) -> list[str]:
        """A problem if the previous two starts of this job both ended without a new checkpoint, because a third one
        would end in the same way."""
        if int(self._environment.get("SLURM_RESTART_COUNT", "0") or 0) < NUM_STALLED_STARTS:
            return []
        before = starts_of_job(self._config.run_dir, self._key.rpartition("-")[0])[-NUM_STALLED_STARTS:]
        if len(before) < NUM_STALLED_STARTS or any(plan.policy_version != version for _, plan in before):
            return []
        numbers = " and ".join(str(start.incarnation + 1) for start, _ in before)
        where = f"still that of global step {version}" if version else "there is none yet"
        return [
            f"starts {numbers} of the run have ended without a new checkpoint ({where}), so the job is not started "
            f"again: {self._config.run_dir / 'logs'} states why they ended; if the time limit ended them, raise "
            "slurm.time or lower checkpoint.every_minutes; then submit the same command again to resume"
        ]

    def _find_plan(self) -> tuple[Start, Plan]:
        run_dir = self._config.run_dir
        found = wait_for(lambda: find_start(run_dir, self._key), PLAN_LIMIT_S)
        if found is None:
            raise TryAgainError(
                f"{self._name}: no plan of node 0 in {run_dir / 'starts'} for {PLAN_LIMIT_S:.0f} s: runs_dir must be "
                "on a file system that all nodes share; otherwise node 0's task has not started"
            )
        return found

    def _check(self, start: Start) -> Verdict:
        """Writes this node's report. The first node waits for all reports and decides; the others wait for its
        verdict."""
        visible = self._environment.get("CUDA_VISIBLE_DEVICES")
        found = self._own_problems + node_problems(self._config, self._share, self._address, visible)
        clock_s = start.clock_ahead_s(self._index)
        start.write_report(Report(node=self._index, host=self._host, clock_s=clock_s, problems=found))
        num_nodes = len(self._topology.nodes)
        if self._is_first:
            began = time.monotonic()

            def all_reports() -> list[Report] | None:
                reports = start.reports(num_nodes)
                return reports if len(reports) == num_nodes else None

            reports = wait_for(all_reports, min(TOLD_AFTER_S, REPORT_LIMIT_S))
            if reports is None:
                self._say(f"waiting for {num_nodes - len(start.reports(num_nodes))} of {num_nodes} nodes to report")
                reports = wait_for(all_reports, REPORT_LIMIT_S) or start.reports(num_nodes)
            problems = all_problems(reports, num_nodes, time.monotonic() - began, self._config.run_dir / "starts")
            start.write_verdict(Verdict(problems=problems))
            if not problems:
                self._say(*(f"{node_name(report.node, report.host)} is ready" for report in reports))
        verdict = wait_for(start.read_verdict, 2 * REPORT_LIMIT_S)
        return verdict or Verdict(problems=[Problem("node 0 has ended before its verdict", is_transient=True)])

    def _refuse(self, problems: list[Problem]) -> int:
        """Ends this node. The first node prints why.

        The exit status is 69 if another start may not have these problems: the job's script then starts the job again,
        as often as the profile allows, but not for 2 (cluster/nemo.py)."""
        if not self._is_first:
            return 0
        for problem in problems:
            print(f"error: {visible(problem.line)}", file=sys.stderr, flush=True)
        return TRY_AGAIN if all(problem.is_transient for problem in problems) else WRONG_INPUT

    def _run_roles(self, start: Start, plan: Plan) -> int:
        config, num_nodes = self._config, len(self._topology.nodes)
        places = [
            NodePlace(
                index=self._index,
                address=self._address,
                interface=self._interface,
                head_address=plan.address,
                rendezvous_port=port,
            )
            for port in plan.rendezvous_ports
        ]
        watch = _Watch(start, self._index, num_nodes, self._topology.deciding_nodes)
        fence = StartFence(config.run_dir, start.incarnation)
        try:
            if self._share.ranks and len(self._topology.training_nodes) > 1:
                outcome = self._all_reduce(places[0], watch)
                if outcome.status != SUCCEEDED:
                    return self._conclude(start, outcome)
            config_file = config.run_dir.absolute() / CONFIG_FILE
            commands = node_commands(
                config, config_file, start.incarnation, self._topology, places[1], self._environment, self._save_by
            )
            stopping = Stopping(config, start.incarnation, self._end_early_s)
            supervisor = Supervisor(commands, config.run_dir / "logs", stopping)
            with ExitStack() as stack:
                stack.enter_context(fence.explaining())
                show = _nothing
                if self._is_first:
                    console = Console(force_terminal=False, highlight=False)  # the job's log
                    show = stack.enter_context(Progress(config, roles_of(config), console)).tick
                only_serves = not (self._share.ranks or self._share.collects)
                tick = guarded_tick(fence, watch.also(show))
                outcome = supervisor.run(tick, watch.others_are_done if only_serves else _always)
        except _OthersFailed as error:
            self._say(f"stopped because {error}", file=sys.stderr)
            return FAILED
        fence.check()  # a role may already have failed for the same reason
        status = self._conclude(start, outcome)
        if self._is_first:
            state_end(config.run_dir, start.incarnation)
        return status

    def _all_reduce(self, place: NodePlace, watch: "_Watch") -> Outcome:
        """Checks a sum over all ranks before they load anything."""
        device = self._config.device
        arguments = [*node_torchrun(self._topology, place), "-m", "minpro_megatron.parallel.all_reduce_check"]
        fabric = trainer_environment(device) | fabric_environment(place, self._environment)
        environment = {**NCCL_MEMORY, **self._environment, **fabric}
        command = RoleCommand(
            "all-reduce", [*arguments, device, f"{ALL_REDUCE_LIMIT_S:g}"], environment,
            log_name=f"all-reduce-node-{self._index}",
        )  # fmt: skip
        outcome = Supervisor([command], self._config.run_dir / "logs").run(watch.also(_nothing))
        if outcome.failures:
            self._say(
                f"the trainer's ranks cannot reach each other over {place.interface} ({place.address}): name another "
                "interface in the profile (slurm.interface), or give NCCL_IB_HCA or NCCL_SOCKET_IFNAME under "
                "environment; NCCL_DEBUG=INFO there shows what NCCL tries",
                file=sys.stderr,
            )
        return outcome

    def _conclude(self, start: Start, outcome: Outcome) -> int:
        if outcome.status == SUCCEEDED:
            start.write_done(self._index, self._host)
            return finish(self._config) if self._is_first else SUCCEEDED
        if outcome.status == TO_BE_CONTINUED:
            return self._end_early(start, outcome)
        if outcome.status == FAILED and finished_summary(self._config) is not None:
            start.write_done(self._index, self._host)
            return finish_despite_failure(self._config, closing_lines(outcome)) if self._is_first else SUCCEEDED
        others = start.failed(len(self._topology.nodes))
        if outcome.interrupted_by and others:  # srun ends the nodes that have not failed
            self._say(f"stopped because {_told(others)}", file=sys.stderr)
            return FAILED
        if outcome.failures:
            why = "; ".join(_described(failure) for failure in outcome.failures)
            start.write_failed(self._index, self._host, why)
        self._say(*closing_lines(outcome), file=sys.stderr)
        return outcome.status

    def _end_early(self, start: Start, outcome: Outcome) -> int:
        """Ends this node. The first node prints why and ends last, so that srun does not end the others before they
        have stopped their roles."""
        start.write_done(self._index, self._host)
        if not self._is_first:
            return SUCCEEDED
        self._say(*closing_lines(outcome))
        nodes = list(range(len(self._topology.nodes)))
        wait_for(lambda: True if start.are_done(nodes) else None, OTHERS_END_S)
        return outcome.status

    @property
    def _name(self) -> str:
        return node_name(self._index, self._host)

    def _say(self, *lines: str, file: object = None) -> None:
        """Prints the lines, with the node's name if there are several nodes."""
        prefix = f"{self._name}: " if len(self._topology.nodes) > 1 else ""
        for line in lines:
            print(f"{prefix}{visible(line)}", file=file or sys.stdout, flush=True)  # type: ignore[call-overload]


class _Watch:
    """The state of the other nodes, read once per second to limit the load on a shared file system."""

    def __init__(self, start: Start, index: int, num_nodes: int, deciding: list[int]) -> None:
        self._start, self._index, self._num_nodes, self._deciding = start, index, num_nodes, deciding
        self._next_look = 0.0
        self._are_done = False

    def also(self, tick: Callable[[], None]) -> Callable[[], None]:
        """`tick`, and a check of the other nodes, which raises _OthersFailed."""

        def both() -> None:
            tick()
            if self._num_nodes > 1 and time.monotonic() > self._next_look:
                self._look()
                self._next_look = time.monotonic() + _LOOK_EVERY_S

        return both

    def others_are_done(self) -> bool:
        return self._are_done

    def _look(self) -> None:
        failed = self._start.failed(self._num_nodes)
        failed.pop(self._index, None)
        if failed:
            raise _OthersFailed(_told(failed))
        self._are_done = self._start.are_done(self._deciding)


def _described(failure: Failure) -> str:
    first = failure.first_rank
    cause = f" (rank {first.rank} failed first: {first.message})" if first is not None else ""
    return f"the role {failure.role} {failure.how}{cause}"


def _told(failed: Mapping[int, NodeEnd]) -> str:
    return "; ".join(f"{node_name(node, end.host)} failed: {end.why}" for node, end in failed.items())


def _nothing() -> None:
    pass


def _always() -> bool:
    return True
