"""Whether a start of a run on several nodes happens: the first node's plan, every node's report, and the verdict."""

import time
from collections.abc import Sequence
from contextlib import ExitStack

from minpro_megatron.checkpoints.resume_point import read_latest
from minpro_megatron.errors import TryAgainError, UserError
from minpro_megatron.launch.preflight.node_checks import all_problems, node_name, node_problems
from minpro_megatron.launch.preflight.problems import Problem, passes
from minpro_megatron.launch.preflight.run_checks import run_problems, warnings
from minpro_megatron.launch.resume import finished_summary
from minpro_megatron.launch.run_folder import claimed, first_lines, prepare
from minpro_megatron.launch.starts import (
    Plan,
    Report,
    Start,
    Verdict,
    begin_start,
    find_start,
    starts_of_job,
    wait_for,
)
from minpro_megatron.launch.this_node import ThisNode
from minpro_megatron.serving.ports import free_ports

# Between the starts of two nodes: each may have to unpack a container image.
PLAN_LIMIT_S = REPORT_LIMIT_S = 600.0
SAID_AFTER_S = 30.0
NUM_STALLED_STARTS = 2  # number of consecutive ones after which a job is not started again


def make_plan(node: ThisNode, held: ExitStack) -> tuple[Start, Plan]:
    """The part of a start that only the first node does: it checks the run and prepares the run folder, which stays
    locked until `held` is closed. Raises UserError or TryAgainError if the folder cannot be used."""
    try:
        start = begin_start(node.config.run_dir)
    except OSError as error:
        kind = TryAgainError if passes(error) else UserError
        raise kind(f"runs_dir = {node.config.runs_dir}: {error}; choose another runs_dir=...") from None
    ports: list[int] = []
    version = 0
    try:
        held.enter_context(claimed(node.config.run_dir))
        if finished_summary(node.config) is not None:
            plan = Plan(key=node.key, is_finished=True)
            start.write_plan(plan)
            return start, plan
        found = [Problem(line) for line in run_problems(node.config)]
        if not found:
            manifest = read_latest(node.config.run_dir)
            version = manifest.policy_version if manifest else 0
            found = [Problem(line) for line in _stalled(node, version)]
        ports = free_ports(node.address, 2)
    except UserError as error:
        found = [Problem(line) for line in error.problems]
    except OSError as error:
        found = [Problem(f"{node.name}: {error}", passes(error))]
    if not found:
        _, goes_on = prepare(node.config, start.incarnation, node.say)
        lines = (f"warning: {warning}" for warning in warnings(node.config))
        node.say(*first_lines(node.config, start.incarnation, goes_on), *lines)
    plan = Plan(key=node.key, problems=found, policy_version=version, address=node.address, rendezvous_ports=ports)
    start.write_plan(plan)
    return start, plan


def _stalled(node: ThisNode, version: int) -> list[str]:
    """A problem if the previous two starts of this job both ended without a new checkpoint, because a third one
    would end in the same way."""
    if not node.job:
        return []
    before = starts_of_job(node.config.run_dir, node.job)[-NUM_STALLED_STARTS:]
    if len(before) < NUM_STALLED_STARTS or any(plan.policy_version != version for _, plan in before):
        return []
    numbers = " and ".join(str(start.incarnation + 1) for start, _ in before)
    where = f"still that of global step {version}" if version else "there is none yet"
    return [
        f"starts {numbers} of the run have ended without a new checkpoint ({where}), so the job is not started "
        f"again: {node.config.run_dir / 'logs'} states why they ended; if the time limit ended them, raise "
        "slurm.time or lower checkpoint.every_minutes; then submit the same command again to resume"
    ]


def find_plan(node: ThisNode) -> tuple[Start, Plan]:
    """The start and its plan, once the first node has written it. Raises TryAgainError if it does not."""
    run_dir = node.config.run_dir
    found = wait_for(lambda: find_start(run_dir, node.key), PLAN_LIMIT_S)
    if found is None:
        raise TryAgainError(
            f"{node.name}: no plan of node 0 in {run_dir / 'starts'} for {PLAN_LIMIT_S:.0f} s: runs_dir must be "
            "on a file system that all nodes share; otherwise node 0's task has not started"
        )
    return found


def agree(node: ThisNode, start: Start, problems: Sequence[Problem] = ()) -> Verdict:
    """Writes this node's report: `problems`, and those that its checks find. The first node waits for all reports and
    decides; the others wait for its verdict."""
    visible = node.environment.get("CUDA_VISIBLE_DEVICES")
    found = [*problems, *node_problems(node.config, node.share, node.address, visible)]
    clock_s = start.clock_ahead_s(node.index)
    start.write_report(Report(node=node.index, host=node.host, clock_s=clock_s, problems=found))
    num_nodes = node.num_nodes
    if node.is_first:
        began = time.monotonic()

        def all_reports() -> list[Report] | None:
            reports = start.reports(num_nodes)
            return reports if len(reports) == num_nodes else None

        reports = wait_for(all_reports, min(SAID_AFTER_S, REPORT_LIMIT_S))
        if reports is None:
            node.say(f"waiting for {num_nodes - len(start.reports(num_nodes))} of {num_nodes} nodes to report")
            reports = wait_for(all_reports, REPORT_LIMIT_S) or start.reports(num_nodes)
        found = all_problems(reports, num_nodes, time.monotonic() - began, node.config.run_dir / "starts")
        start.write_verdict(Verdict(problems=found))
        if not found:
            node.say(*(f"{node_name(report.node, report.host)} is ready" for report in reports))
    verdict = wait_for(start.read_verdict, 2 * REPORT_LIMIT_S)
    return verdict or Verdict(problems=[Problem("node 0 has ended before its verdict", is_transient=True)])
