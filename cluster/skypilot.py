"""A run with SkyPilot: a managed job, described in the format of SkyPilot's task files and handled by NeMo-Run.

NeMo-Run's own task has no place for the restarts, nor for a claim of Kubernetes, so the task is made here; NeMo-Run
launches, observes and cancels it. NeMo-Run 0.11.1 was written for a launch that returns one number, and SkyPilot 0.14
returns a list.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minpro_megatron.cluster.job_files import JobFiles
from minpro_megatron.cluster.job_folder import write_job_folder
from minpro_megatron.cluster.job_script import SCRIPT_FILE
from minpro_megatron.cluster.profile import Profile
from minpro_megatron.cluster.slurm_job import JOB_PREFIX, JobError, JobState
from minpro_megatron.errors import TO_BE_CONTINUED, UserError

# Where every node finds the job's folder.
_FOLDER = "~/minpro_job"
_ENDED = {"SUCCEEDED": "COMPLETED", "CANCELLED": "CANCELLED"}


def task(files: JobFiles, profile: Profile, folder: str) -> dict[str, Any]:
    """The run as the content of a task file; `folder` is the job's folder on this machine."""
    sky = profile.skypilot
    resources: dict[str, Any] = {
        "infra": sky.infra,
        "image_id": f"docker:{profile.container.image}",
        # 75 of any node starts all nodes again, without a limit: the job's script counts failures. Any other status
        # ends the job. SkyPilot itself replaces lost machines.
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [TO_BE_CONTINUED]},
    }
    if profile.topology.gpus_per_node:
        resources["accelerators"] = {sky.accelerator: profile.topology.gpus_per_node}
    resources |= {name: value for name in ("cpus", "memory", "network_tier") if (value := getattr(sky, name))}
    if sky.use_spot:
        resources["use_spot"] = True
    made: dict[str, Any] = {
        "name": _name(files),
        "num_nodes": files.num_nodes,
        "resources": resources,
        "file_mounts": {_FOLDER: folder},
        "run": f"bash {_FOLDER}/{SCRIPT_FILE}",
    }
    if sky.setup:
        made["setup"] = "\n".join(["set -e", *sky.setup])
    if sky.claim:
        made["config"] = {"kubernetes": {"pod_config": _claim(sky.claim, profile.workspace)}}
    return made


def submit(files: JobFiles, profile: Profile, folder: Path) -> str:
    """Writes the job's files into the new `folder`, from which SkyPilot copies them, and launches the managed job.
    Returns NeMo-Run's name of the job. Raises UserError if SkyPilot refuses it."""
    executor = _executor()
    from sky import Task

    write_job_folder(folder, files, profile)
    try:
        made = Task.from_yaml_config(task(files, profile, str(folder)))
        jobs, handle = executor().launch(made)
    except (ValueError, AssertionError) as error:
        raise UserError(f"the job was not submitted: SkyPilot: {' '.join(str(error).split())}") from None
    (job,) = jobs if isinstance(jobs, list) else [jobs]
    cluster = handle.get_cluster_name() if handle else "jobs"
    return f"{cluster}___{_name(files)}___{job}"


def look_up(job: str) -> JobState:
    """The state of the managed job. Raises JobError if SkyPilot does not know it."""
    try:
        details = _executor().status(job)
    except IndexError:
        details = None
    if not details:
        raise JobError(f"SkyPilot does not know the managed job {number_of(job)}: sky jobs queue")
    status = details["status"]
    word = getattr(status, "value", str(status))
    if not status.is_terminal():
        state = "RUNNING" if word == "RUNNING" else "PENDING"
        return JobState(state=state, reason="" if word == "RUNNING" else word, restarts=details["recovery_count"] or 0)
    state = _ENDED.get(word, "FAILED")
    return JobState(state=state, exit_status=int(state == "FAILED"), restarts=details["recovery_count"] or 0)


def cancel(job: str) -> None:
    """Ends the managed job and gives its machines back."""
    _executor().cancel(job)


def show_logs(job: str) -> None:
    """Prints the job's output until it ends."""
    _executor().logs(job, None)


def number_of(job: str) -> str:
    """SkyPilot's number of the managed job."""
    return job.rpartition("___")[2]


def _executor() -> Any:
    if find_spec("sky") is None:
        raise UserError(
            "executor = skypilot needs SkyPilot: pip install 'minpro-megatron[cluster,skypilot]' in a virtual "
            "environment of its own"
        )
    from nemo_run.core.execution.skypilot_jobs import SkypilotJobsExecutor

    return SkypilotJobsExecutor


def _claim(claim: str, path: str) -> dict[str, Any]:
    """The part of a pod's description that mounts the claim; SkyPilot merges it into its own."""
    return {
        "spec": {
            "volumes": [{"name": "workspace", "persistentVolumeClaim": {"claimName": claim}}],
            "containers": [{"volumeMounts": [{"name": "workspace", "mountPath": path}]}],
        }
    }


def _name(files: JobFiles) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{JOB_PREFIX}{files.name}".lower()).strip("-")
