"""Runs one node's share of a run on several nodes; a cluster's job starts one such process on each node.

The first node prepares the run folder and writes a plan; every node checks itself and writes a report; the first node
writes its verdict; then the roles run. The nodes communicate through files (launch/starts.py). The program that started
the processes may end all of them as soon as one fails, as `srun --kill-on-bad-exit` does.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from minpro_megatron.errors import (
    FAILED,
    SUCCEEDED,
    TO_BE_CONTINUED,
    TRY_AGAIN,
    WRONG_INPUT,
    ProjectError,
    UserError,
)
from minpro_megatron.files.disk_space import naming_full_disk
from minpro_megatron.launch.agreement import agree, find_plan, make_plan
from minpro_megatron.launch.finished import finish, finish_again, finish_despite_failure
from minpro_megatron.launch.job_status import state_exit_status
from minpro_megatron.launch.launcher import closing_lines, guarded_tick
from minpro_megatron.launch.node_roles import LOOPBACK, NodePlace, fabric_environment, node_commands, node_torchrun
from minpro_megatron.launch.other_nodes import OtherNodes, OthersFailed, failure_text
from minpro_megatron.launch.preflight.node_checks import routable_address
from minpro_megatron.launch.preflight.problems import Problem
from minpro_megatron.launch.recipe import read_config
from minpro_megatron.launch.resume import CONFIG_FILE, finished_summary
from minpro_megatron.launch.roles import NCCL_MEMORY, roles_of, trainer_environment
from minpro_megatron.launch.starts import Plan, Start, slurm_key, wait_for
from minpro_megatron.launch.stopping import Stopping, save_by
from minpro_megatron.launch.supervisor import Failure, Outcome, RoleCommand, Supervisor
from minpro_megatron.launch.this_node import ThisNode
from minpro_megatron.launch.topology import read_topology
from minpro_megatron.monitor.progress import Progress
from minpro_megatron.run_folder.start_fence import StartFence, state_end
from minpro_megatron.terminal_text import visible

ALL_REDUCE_LIMIT_S = 180.0
OTHERS_END_S = 20.0  # time for the other nodes to end after an early end


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """The options of the command `node`; those with a default of None come from Slurm's variables."""

    config: Path
    topology: Path
    job: str | None = None
    start: str | None = None
    index: int | None = None
    interface: str = ""
    end_early_s: float = 0.0  # time before the job's end at which its processes get SIGTERM


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
    address, interface, problems = _reachable_at(options, len(topology.nodes))
    this = ThisNode(
        config=config,
        topology=topology,
        index=index,
        job=_job(options, environment),
        key=_key(options, environment),
        host=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        environment=environment,
        address=address,
        interface=interface,
    )
    node = _Node(this, problems, limit, options.end_early_s)
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


def _job(options: NodeOptions, environment: Mapping[str, str]) -> str:
    """The job's name, the same for all of its starts; empty if nothing restarts it."""
    if options.start:
        return options.job or ""
    return f"slurm-{environment['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in environment else ""


def _key(options: NodeOptions, environment: Mapping[str, str]) -> str:
    job, start = options.job, options.start
    if start and job and start.rpartition("-")[0] != job:
        raise UserError(f"--start {start}: with --job {job} it must be {job}-NUMBER")
    if start:
        return start
    if "SLURM_JOB_ID" not in environment:
        raise UserError("--start is missing: give all nodes of this start the same new name")
    return slurm_key(environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0"))


def _reachable_at(options: NodeOptions, num_nodes: int) -> tuple[str, str, list[Problem]]:
    """(address, interface) at which the other nodes reach this one; with a problem if there is none."""
    if num_nodes > 1:
        try:
            return *routable_address(options.interface), []
        except UserError as error:
            return LOOPBACK, "lo", [Problem(str(error))]
    return LOOPBACK, "lo", []


class _Node:
    """One node's part of a start."""

    def __init__(self, this: ThisNode, problems: list[Problem], limit: float | None, end_early_s: float) -> None:
        self._this, self._problems, self._save_by, self._end_early_s = this, problems, limit, end_early_s
        self._config, self._topology = this.config, this.topology

    def run(self) -> int:
        with ExitStack() as held:
            remedy = "choose another runs_dir=..."
            with naming_full_disk(self._config.run_dir, f"runs_dir = {self._config.runs_dir}", remedy):
                start, plan = make_plan(self._this, held) if self._this.is_first else find_plan(self._this)
            if plan.problems:
                return self._refuse(plan.problems)
            if plan.is_finished:
                return self._finish_again()
            verdict = agree(self._this, start, self._problems)
            if verdict.problems:
                return self._refuse(verdict.problems)
            return self._run_roles(start, plan)

    def _finish_again(self) -> int:
        """All nodes succeed; the first one writes missing files and prints the run's results."""
        summary = finished_summary(self._config) if self._this.is_first else None
        return SUCCEEDED if summary is None else finish_again(self._config, summary)

    def _refuse(self, problems: list[Problem]) -> int:
        """Ends this node. The first node prints why.

        The exit status is 69 if another start may not have these problems: the job's script then starts the job again,
        as often as the profile allows, but not for 2 (cluster/nemo.py)."""
        if not self._this.is_first:
            return 0
        for problem in problems:
            print(f"error: {visible(problem.line)}", file=sys.stderr, flush=True)
        return TRY_AGAIN if all(problem.is_transient for problem in problems) else WRONG_INPUT

    def _run_roles(self, start: Start, plan: Plan) -> int:
        config, num_nodes = self._config, self._this.num_nodes
        places = [
            NodePlace(
                index=self._this.index,
                address=self._this.address,
                interface=self._this.interface,
                head_address=plan.address,
                rendezvous_port=port,
            )
            for port in plan.rendezvous_ports
        ]
        watch = OtherNodes(start, self._this.index, num_nodes, self._topology.deciding_nodes)
        fence = StartFence(config.run_dir, start.incarnation)
        try:
            if self._this.share.ranks and len(self._topology.training_nodes) > 1:
                outcome = self._all_reduce(places[0], watch)
                if outcome.status != SUCCEEDED:
                    return self._conclude(start, outcome)
            config_file = config.run_dir.absolute() / CONFIG_FILE
            commands = node_commands(
                config, config_file, start.incarnation, self._topology, places[1], self._this.environment, self._save_by
            )
            stopping = Stopping(config, start.incarnation, self._end_early_s, self._this.environment)
            supervisor = Supervisor(commands, config.run_dir / "logs", stopping)
            with ExitStack() as stack:
                stack.enter_context(fence.explaining())
                show = _nothing
                if self._this.is_first:
                    console = Console(force_terminal=False, highlight=False)  # the job's log
                    show = stack.enter_context(Progress(config, roles_of(config), console)).tick
                only_serves = not (self._this.share.ranks or self._this.share.collects)
                tick = guarded_tick(fence, watch.also(show))
                outcome = supervisor.run(tick, watch.others_are_done if only_serves else _always)
        except OthersFailed as error:
            self._this.say(f"stopped because {error}", file=sys.stderr)
            return FAILED
        fence.check()  # a role may already have failed for the same reason
        status = self._conclude(start, outcome)
        if self._this.is_first:
            state_end(config.run_dir, start.incarnation)
        return status

    def _all_reduce(self, place: NodePlace, watch: OtherNodes) -> Outcome:
        """Checks a sum over all ranks before they load anything."""
        device = self._config.device
        arguments = [*node_torchrun(self._topology, place), "-m", "minpro_megatron.parallel.all_reduce_check"]
        fabric = trainer_environment(device) | fabric_environment(place, self._this.environment)
        environment = {**NCCL_MEMORY, **self._this.environment, **fabric}
        command = RoleCommand(
            "all-reduce", [*arguments, device, f"{ALL_REDUCE_LIMIT_S:g}"], environment,
            log_name=f"all-reduce-node-{self._this.index}",
        )  # fmt: skip
        outcome = Supervisor([command], self._config.run_dir / "logs").run(watch.also(_nothing))
        if outcome.failures:
            self._this.say(
                f"the trainer's ranks cannot reach each other over {place.interface} ({place.address}): name another "
                "interface in the profile (slurm.interface, kubernetes.interface or skypilot.interface), or give "
                "NCCL_IB_HCA or NCCL_SOCKET_IFNAME under environment; NCCL_DEBUG=INFO there shows what NCCL tries",
                file=sys.stderr,
            )
        return outcome

    def _conclude(self, start: Start, outcome: Outcome) -> int:
        if outcome.status == SUCCEEDED:
            start.write_done(self._this.index, self._this.host)
            return finish(self._config) if self._this.is_first else SUCCEEDED
        if outcome.status == TO_BE_CONTINUED:
            return self._end_early(start, outcome)
        if outcome.status == FAILED and finished_summary(self._config) is not None:
            start.write_done(self._this.index, self._this.host)
            return finish_despite_failure(self._config, closing_lines(outcome)) if self._this.is_first else SUCCEEDED
        others = start.failed(self._this.num_nodes)
        if outcome.interrupted_by and others:  # srun ends the nodes that have not failed
            self._this.say(f"stopped because {failure_text(others)}", file=sys.stderr)
            return FAILED
        if outcome.failures:
            why = "; ".join(_described(failure) for failure in outcome.failures)
            start.write_failed(self._this.index, self._this.host, why)
        self._this.say(*closing_lines(outcome), file=sys.stderr)
        return outcome.status

    def _end_early(self, start: Start, outcome: Outcome) -> int:
        """Ends this node. The first node prints why and ends last, so that srun does not end the others before they
        have stopped their roles."""
        start.write_done(self._this.index, self._this.host)
        if not self._this.is_first:
            return SUCCEEDED
        self._this.say(*closing_lines(outcome))
        nodes = list(range(self._this.num_nodes))
        wait_for(lambda: True if start.are_done(nodes) else None, OTHERS_END_S)
        return outcome.status


def _described(failure: Failure) -> str:
    first = failure.first_rank
    cause = f" (rank {first.rank} failed first: {first.message})" if first is not None else ""
    return f"the role {failure.role} {failure.how}{cause}"


def _nothing() -> None:
    pass


def _always() -> bool:
    return True
