"""A run on Slurm or on this machine: an experiment of NeMo-Run with one task, packaged, sent and submitted.

NeMo-Run's script starts several tasks of a group 30 s apart, takes the status of the one that ends first and polls
once per minute. Here the group is one srun over all nodes instead, with one process per node
(minpro_megatron/launch/node.py), which knows its node's roles: srun ends all processes as soon as one fails, and its
exit status is the job's.
"""

import logging
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nemo_run
from invoke.exceptions import UnexpectedExit
from nemo_run.config import get_nemorun_home
from nemo_run.core.packaging.base import Packager
from torchx.specs.api import AppState

from minpro_megatron.cluster.job_files import RUN_FILE, TOPOLOGY_FILE, JobFiles, archive_code
from minpro_megatron.cluster.local_job import ended_by_interrupt
from minpro_megatron.cluster.profile import Profile
from minpro_megatron.cluster.slurm_job import JOB_PREFIX, no_restart_file
from minpro_megatron.cluster.tunnel import tunnel
from minpro_megatron.errors import TO_BE_CONTINUED, WRONG_INPUT, UserError
from minpro_megatron.launch.job_status import EXIT_STATUS_VARIABLE, STATED

# NeMo-Run's name for the job's folder inside the job; without a container it is replaced by the real path.
_CONFIGS = "/nemo_run/configs"
# Remedies for a failing command of the submission; the command itself reports its error.
_REMEDIES = {
    "sbatch": "correct [slurm] in the profile: account, partition, qos, time, gres, ...",
    "rsync": "it must be installed here and on the login node, and `ssh` there must work without a question",
}
# Inserted after NeMo-Run's own lines, before srun. Its script is traced; tracing is turned off here, because what
# follows may be secret. At its end the script requests a requeue if the exit status is not 0 and TORCHX_MAX_RETRIES is
# above the number of restarts so far. These lines decide which restarts count: an end before the time limit is not a
# failure. srun's exit status is the largest of all nodes: when one node has ended with 2, srun ends the others by a
# signal, and the status is 143. Therefore the statuses that decide about a restart are read from the nodes' files.
_SETUP = """\
{ set +vx; } 2>/dev/null
# After the loss of a node or a preemption Slurm starts the job again without asking this script.
if [ -e "$no_restart" ]; then
    echo "not started again: its end was requested"
    echo "job exited with code @TO_BE_CONTINUED@"
    exit @TO_BE_CONTINUED@
fi
# Versions of Slurm before 23.02 do not say when the job ends.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
    job_end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2>/dev/null)
    case "$job_end" in
        [0-9]*) export SLURM_JOB_END_TIME=$(date --date="$job_end" +%s) ;;
    esac
fi
export EXIT_STATUS_VARIABLE="${exit_statuses}_${SLURM_RESTART_COUNT:-0}"
failures_allowed=$TORCHX_MAX_RETRIES
TORCHX_MAX_RETRIES=1000000
scontrol() {
    if [ "$1" != requeue ]; then
        command scontrol "$@"
        return
    fi
    for stated in STATUSES; do
        if [ -e "$EXIT_STATUS_VARIABLE.$stated" ]; then
            exitcode=$stated
            break
        fi
    done
    failed=$((${SLURM_RESTART_COUNT:-0} - $(cat "$planned_ends" 2>/dev/null | wc -l)))
    if [ -e "$no_restart" ]; then
        echo "not started again: its end was requested"
    elif [ "$exitcode" -eq @WRONG_INPUT@ ]; then
        # refused for problems: it would be refused again
        echo "not started again: the problems above have to be fixed first"
    elif [ "$exitcode" -eq @TO_BE_CONTINUED@ ]; then
        # saved before its time limit
        echo "start ${SLURM_RESTART_COUNT:-0}" >> "$planned_ends"
        command scontrol "$@"
    elif [ "$failed" -lt "$failures_allowed" ]; then
        command scontrol "$@"
    else
        echo "not started again: failed starts: $((failed + 1)), restarts = $failures_allowed in the profile"
    fi
}
""".replace("EXIT_STATUS_VARIABLE", EXIT_STATUS_VARIABLE).replace("STATUSES", " ".join(map(str, STATED)))
_SETUP = _SETUP.replace("@WRONG_INPUT@", str(WRONG_INPUT)).replace("@TO_BE_CONTINUED@", str(TO_BE_CONTINUED))


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job that sbatch has accepted: its number, and the folder of its logs on the cluster."""

    job_id: str
    folder: str


@dataclass(kw_only=True)
class WorkingTree(Packager):
    """Packages the current files of the checkout, committed or not (of untracked files those that git does not
    ignore), together with the job's settings."""

    configs: dict[str, str] = field(default_factory=dict)

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """Writes the archive that NeMo-Run unpacks into the job's working folder; returns its path."""
        configs = Path(job_dir, "configs")
        configs.mkdir(parents=True, exist_ok=True)
        for file, text in self.configs.items():
            (configs / file).write_text(text, encoding="utf-8")
        archive = Path(job_dir, f"{name}.tar.gz")
        archive_code(archive)
        return str(archive)


def script_of(files: JobFiles, profile: Profile) -> str:
    """The sbatch script of the job; nothing is sent or started."""
    with tempfile.TemporaryDirectory() as folder, _experiment(files, profile, Path(folder)) as experiment:
        experiment.dryrun(log=False, delete_exp_dir=False)
        (script,) = Path(experiment._exp_dir).glob("*_sbatch.sh")
        return script.read_text(encoding="utf-8").replace(folder, str(_base(profile)))


def submit(files: JobFiles, profile: Profile) -> Submitted:
    """Sends the job's files and submits the script with sbatch. Raises UserError if sbatch rejects the job."""
    with _experiment(files, profile, _base(profile)) as experiment:
        try:
            experiment.run(detach=True)
        except UnexpectedExit as error:
            raise UserError(_refusal(error)) from None
        (job,) = experiment.jobs
        executor = job.executor
        # a job handle is slurm_tunnel://<session>/<job id>
        return Submitted(job_id=job.handle.rpartition("/")[2], folder=executor.job_details.folder)


def _refusal(error: UnexpectedExit) -> list[str]:
    """The command's output, and a remedy."""
    result = error.result
    program = result.command.split()[0]
    remedy = _REMEDIES.get(program, "see its output above")
    said = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
    return [*said, f"the job was not submitted: {program} failed with exit status {result.exited}: {remedy}"]


def _base(profile: Profile) -> Path:
    """The folder in which NeMo-Run keeps an experiment. On a login node the job's nodes can read it."""
    return Path(get_nemorun_home()) if profile.ssh else Path(profile.jobs_folder)


def run_here(files: JobFiles, profile: Profile) -> bool:
    """Runs the only node's roles on this machine, with their output in this process's; returns whether it succeeded."""
    start = f"{files.name}_{time.time_ns()}"
    configs = Path(profile.jobs_folder) / "local" / start
    configs.mkdir(parents=True)
    for name, text in files.configs.items():
        (configs / name).write_text(text, encoding="utf-8")
    script = _script(profile.python, [*_arguments(profile, str(configs)), "--start", start, "--index", "0"])
    executor = nemo_run.LocalExecutor(env_vars=dict(profile.environment))
    # The experiment waits for the job at its end.
    with ended_by_interrupt(), _empty_experiment(files.name, Path(profile.jobs_folder)) as experiment:
        experiment.add(script, executor=executor, name=files.name, tail_logs=True)
        experiment.run()
    return experiment.jobs[0].state == AppState.SUCCEEDED


@contextmanager
def _experiment(files: JobFiles, profile: Profile, base: Path) -> Iterator[Any]:
    """The experiment with its single task; its folder is created below `base`."""
    script = _script(_word(profile.python), [_word(argument) for argument in _arguments(profile, _CONFIGS)])
    with _empty_experiment(files.name, base) as experiment:
        experiment.add(script, executor=_executor(files, profile, base), name=files.name)
        yield experiment


def _script(python: str, arguments: list[str]) -> Any:
    return nemo_run.Script(path="minpro_megatron", m=True, entrypoint=python, args=arguments)


@contextmanager
def _empty_experiment(name: str, base: Path) -> Iterator[Any]:
    """An experiment without tasks."""
    with _logging_restored():
        experiment = _Experiment(
            name,
            base_dir=str(base),
            log_level="ERROR",
            clean_mode=True,
            enable_goodbye_message=False,
            skip_status_at_exit=True,
            serialize_metadata_for_scripts=False,
        )
        with experiment:
            yield experiment


class _Experiment(nemo_run.Experiment):
    """An experiment whose finalizer leaves this process's logging as it is.

    NeMo-Run's removes the first handler of the root logger, whoever added it, at any time after the end of the
    experiment, since the garbage collector calls it.
    """

    def __del__(self) -> None:
        with _logging_restored():
            super().__del__()


@contextmanager
def _logging_restored() -> Iterator[None]:
    """Restores the handlers and the level of the root logger afterwards. Inside there are no handlers, because NeMo-Run
    closes those that it finds."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


def _arguments(profile: Profile, configs: str) -> list[str]:
    interface = ["--interface", profile.slurm.interface] if profile.slurm.interface else []
    end_early = ["--end-early-s", str(profile.slurm.end_early_s)] if profile.slurm.end_early_s else []
    files = ["--config", f"{configs}/{RUN_FILE}", "--topology", f"{configs}/{TOPOLOGY_FILE}"]
    return ["node", *files, *end_early, *interface]


def _executor(files: JobFiles, profile: Profile, base: Path) -> Any:
    slurm, gpus = profile.slurm, profile.topology.gpus_per_node
    return nemo_run.SlurmExecutor(
        account=slurm.account or None,  # type: ignore[arg-type]  # None leaves the option out
        partition=slurm.partition or None,
        qos=slurm.qos or None,
        time=slurm.time,
        signal=f"TERM@{slurm.end_early_s}" if slurm.end_early_s else None,  # to the processes, not to the script
        constraint=slurm.constraint or None,
        exclude=slurm.exclude or None,
        mem=slurm.mem or None,
        exclusive=slurm.exclusive or None,
        cpus_per_task=slurm.cpus_per_task or None,
        gres=slurm.gres or None,
        gpus_per_node=gpus if gpus and not slurm.gres else None,
        additional_parameters=dict(slurm.additional) or None,
        job_name_prefix=JOB_PREFIX,
        nodes=files.num_nodes,
        ntasks_per_node=1,
        # --wait: nodes that only serve may end long before those that train. --cpu-bind: the single task of a node
        # is all of its ranks and servers, and some clusters by default bind a task to one core.
        srun_args=[
            "--wait=0",
            "--cpu-bind=none",
            *([f"--cpus-per-task={slurm.cpus_per_task}"] if slurm.cpus_per_task else []),
            *slurm.srun,
        ],
        container_image=profile.container.image or None,
        container_mounts=profile.mounts if profile.container.image else [],
        container_env=sorted(profile.environment) or None,
        env_vars={name: _word(value) for name, value in profile.environment.items()},
        setup_lines=_setup_lines(profile),
        retries=profile.restarts,
        tunnel=tunnel(profile.ssh, profile.jobs_folder if profile.ssh else str(base / "experiments")),
        packager=WorkingTree(configs=files.configs),
        poll_estimated_start_time=False,
    )


def _setup_lines(profile: Profile) -> str:
    """`planned_ends` has one line for each start that ended before its time limit. `exit_statuses` is the beginning of
    the paths of the files in which nodes state their exit status, and `no_restart` exists after `minpro cancel --save`.
    """
    planned_ends = f"{shlex.quote(profile.jobs_folder)}/planned_ends_$SLURM_JOB_ID"
    secrets = f". {shlex.quote(profile.secrets_file)}\n" if profile.secrets_file else ""
    exit_statuses = f"{shlex.quote(profile.jobs_folder)}/exit_status_$SLURM_JOB_ID"
    no_restart = no_restart_file(shlex.quote(profile.jobs_folder), "$SLURM_JOB_ID")
    files = f"planned_ends={planned_ends}\nexit_statuses={exit_statuses}\nno_restart={no_restart}\n"
    return f"{files}{_SETUP}{secrets}"


def _word(text: str) -> str:
    """`text` as one word of the script: quoted for the shell, and first for the templates that NeMo-Run fills in."""
    return shlex.quote(text).replace("$", "$$")
