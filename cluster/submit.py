"""Submit a run to a cluster as one job.

    minpro submit recipes.qwen3_30b_a3b:minpro --profile my_cluster.toml optimizer.learning_rate=1e-6

Exit status: 0 if the job has completed (with --detach: was submitted; with --dry-run: could be), 1 if it has failed, 2
if nothing was submitted or following was interrupted by an error, 130 after an interrupt, which ends following
only, or the job if it runs on this machine.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from msgspec import structs

from minpro_megatron.cluster import pods
from minpro_megatron.cluster.follow import HERE, OVER_SSH, follow, follow_state
from minpro_megatron.cluster.job_files import JobFiles
from minpro_megatron.cluster.paths import in_workspace
from minpro_megatron.cluster.planning import plan_problems
from minpro_megatron.cluster.profile import Profile, read_profile, refuse_placeholders
from minpro_megatron.cluster.records import JobRecord, noted_check, records_folder, remember
from minpro_megatron.cluster.shell import shell_of
from minpro_megatron.cluster.slurm_job import SAVED, JobError, JobState, active_jobs, job_name
from minpro_megatron.command_line import Parser, add_recipe
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import FAILED, INTERRUPTED, SUCCEEDED, UserError, run_reporting
from minpro_megatron.launch.preflight.run_checks import run_problems, warnings
from minpro_megatron.launch.recipe import apply_overrides, load_recipe
from minpro_megatron.launch.topology import Topology, lay_out


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=(__doc__ or "").split("\n")[0])
    add_recipe(parser)
    parser.add_argument("--profile", type=Path, required=True, metavar="FILE", help="the cluster (cluster/profiles)")
    parser.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="section.key=value",
        help="settings of the profile to change, such as topology.serve_nodes=4",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only print the nodes' roles and the job's script")
    parser.add_argument("--force", action="store_true", help="submit even if the planner expects that it does not fit")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="first rehearse a trainer rank of each kind (`minpro rehearse`): minutes",
    )
    parser.add_argument("--detach", action="store_true", help="do not wait for the job's end")
    return parser


def main(arguments: list[str] | None = None, prog: str = "minpro submit") -> int:
    options = _parser(prog).parse_intermixed_args(arguments)  # settings may come before and after options
    return run_reporting(lambda: _submit(options))


def _submit(options: argparse.Namespace) -> int:
    profile = read_profile(options.profile, options.changes)
    refuse_placeholders(profile, options.profile)
    config = in_workspace(apply_overrides(load_recipe(options.recipe), options.overrides), profile.workspace)
    if options.dry_run:
        topology = _checked(options, config, profile)
        _describe(config, topology, profile)
        return 0
    with noted_check(records_folder(), config.name):  # until the job has a record
        topology = _checked(options, config, profile)
        if profile.executor in ("kubernetes", "skypilot"):
            return _run_pods(config, topology, profile, options.detach)
        if profile.executor == "local":
            return _run_here(config, topology, profile)
        return _run(config, topology, profile, options.detach)


def _checked(options: argparse.Namespace, config: RunConfig, profile: Profile) -> Topology:
    """The places of the roles, which are printed with all warnings. Raises UserError if the run cannot be submitted."""
    topology = lay_out(config, profile.topology)
    if (found := plan_problems(config, profile)) and not options.force:
        raise UserError([*found, "the planner expects that this run does not fit; --force submits it anyway"])
    for line in [*(f"warning: {problem}" for problem in found), *shares(topology)]:
        print(line)
    if profile.executor == "local" and (len(topology.nodes) > 1 or options.detach):
        raise UserError(
            f"executor = local: it runs one node, and stays until its end; this run has {len(topology.nodes)} nodes: "
            "leave out --detach, raise topology.gpus_per_node, or use a profile of a cluster"
        )
    if options.rehearse:
        from minpro_megatron.rehearsal.verdict import refuse_what_does_not_fit

        refuse_what_does_not_fit(options.recipe, config, options.overrides, profile.gpu)
    # the run's files are on this machine's file system
    if not options.dry_run and profile.executor in ("slurm", "local") and profile.ssh is None:
        if found := run_problems(config):
            raise UserError(found)
        for warning in warnings(config):
            print(f"warning: {warning}")
    return topology


def _describe(config: RunConfig, topology: Topology, profile: Profile) -> None:
    """Prints what a job would be made of."""
    print(f"\n# run.json\n{config.to_json()}")
    if profile.executor == "slurm":
        from minpro_megatron.cluster.nemo import script_of

        print(f"# the job's script\n{script_of(_files(config, topology), profile)}")
    elif profile.executor in ("kubernetes", "skypilot"):
        print(pods.description(_files(config, topology), profile))


def _run_here(config: RunConfig, topology: Topology, profile: Profile) -> int:
    """Runs the job to its end in this process; its record lets `status` and `logs` find it."""
    from minpro_megatron.cluster.nemo import run_here

    record = JobRecord(
        name=config.name,
        job_id=f"local-{os.getpid()}",
        run_dir=str(config.run_dir),
        log_folder=str(config.run_dir / "logs"),
        submitted_at=time.time(),
        process_id=os.getpid(),
    )
    remember(records_folder(), record)
    status = INTERRUPTED
    try:
        status = SUCCEEDED if run_here(_files(config, topology), profile) else FAILED
    finally:
        remember(records_folder(), structs.replace(record, exit_status=status))
    return status


def shares(topology: Topology) -> list[str]:
    """One line per node with its roles."""
    lines = []
    for index, node in enumerate(topology.nodes):
        does = [f"{node.ranks} trainer ranks"] if node.ranks else []
        servers = range(node.first_server, node.first_server + node.num_servers)
        does += (
            [f"server {servers[0]}" if len(servers) == 1 else f"servers {servers[0]}-{servers[-1]}"] if servers else []
        )
        does += ["the collector"] if node.collects else []
        lines.append(f"node {index}: {', '.join(does)}")
    return lines


def _files(config: RunConfig, topology: Topology) -> JobFiles:
    from minpro_megatron.cluster.nemo import JobFiles

    return JobFiles(
        name=config.name,
        run_json=config.to_json(),
        topology_json=topology.to_json(),
        num_nodes=len(topology.nodes),
    )


def _run(config: RunConfig, topology: Topology, profile: Profile, detach: bool) -> int:
    shell = shell_of(profile.ssh)
    try:
        if running := active_jobs(shell, job_name(config.name)):
            raise UserError(
                f"name = {config.name}: job {', '.join(running)} of this name has not ended; cancel it "
                f"(minpro cancel {running[0]}) or give another name=..."
            )
    except JobError as error:
        raise UserError(f"{error}; is this a login node? Otherwise give the profile an [ssh] section") from None
    from minpro_megatron.cluster.nemo import submit

    job = submit(_files(config, topology), profile)
    record = JobRecord(
        name=config.name,
        job_id=job.job_id,
        run_dir=str(config.run_dir),
        log_folder=job.folder,
        jobs_folder=profile.jobs_folder,
        submitted_at=time.time(),
        ssh=profile.ssh.model_dump() if profile.ssh else None,
    )
    remember(records_folder(), record)
    print(f"job {job.job_id}: submitted as {job_name(config.name)}; logs in {job.folder}, run in {config.run_dir}")
    print(f"minpro status {config.name}   (or minpro logs, minpro cancel)", flush=True)
    if detach:
        return 0
    try:
        state = follow(shell, job.job_id, job.folder, intervals=OVER_SSH if profile.ssh else HERE)
    except KeyboardInterrupt:
        print(f"\nno longer following; the job continues: minpro logs {config.name} --follow")
        return INTERRUPTED
    except JobError as error:
        raise UserError(f"{error}; the job may still run: minpro status {config.name}") from None
    return conclude(state, record)


def _run_pods(config: RunConfig, topology: Topology, profile: Profile, detach: bool) -> int:
    """Submits to Kubernetes or SkyPilot, and reports the job's states until it has ended."""
    job_id = pods.submit(_files(config, topology), profile, records_folder())
    record = JobRecord(
        name=config.name,
        job_id=job_id,
        run_dir=str(config.run_dir),
        log_folder=str(config.run_dir / "logs"),
        submitted_at=time.time(),
        executor=profile.executor,
        namespace=profile.kubernetes.namespace if profile.executor == "kubernetes" else "",
    )
    remember(records_folder(), record)
    print(f"job {job_id}: submitted; run in {config.run_dir}")
    print(f"minpro status {config.name}   (or minpro logs, minpro cancel)", flush=True)
    if detach:
        return 0
    try:
        return conclude(follow_state(lambda: pods.look_up(record), job_id), record)
    except KeyboardInterrupt:
        print(f"\nno longer following; the job continues: minpro status {config.name}")
        return INTERRUPTED
    except JobError as error:
        raise UserError(f"{error}; the job may still run: minpro status {config.name}") from None


def conclude(state: JobState, record: JobRecord) -> int:
    """Reports how the job ended; returns the exit status."""
    if state.has_succeeded:
        print(f"job {record.job_id}: completed; the run is in {record.run_dir}")
        return 0
    if state.has_saved:
        print(f"job {record.job_id}: {SAVED}", file=sys.stderr)
        return FAILED
    print(
        f"error: job {record.job_id} of the run {record.name}: {state}; its log is in {record.log_folder}, those of "
        f"the roles in {record.run_dir}/logs; submit the same command again to resume",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    from minpro_megatron.__main__ import run_command

    sys.exit(run_command("submit", sys.argv[1:], "python -m cluster.submit"))
