"""Jobs on Kubernetes and with SkyPilot, where no folder of logs and no program of Slurm is at hand."""

import time
from pathlib import Path

import yaml

from minpro_megatron.cluster.job_files import JobFiles
from minpro_megatron.cluster.job_script import job_script
from minpro_megatron.cluster.profile import Profile
from minpro_megatron.cluster.records import JobRecord, all_records
from minpro_megatron.cluster.slurm_job import JobError, JobState
from minpro_megatron.errors import UserError


def description(files: JobFiles, profile: Profile) -> str:
    """What would be submitted: the objects of Kubernetes or SkyPilot's task, and the script of each node."""
    if profile.executor == "kubernetes":
        from minpro_megatron.cluster.kubeflow import manifests

        made, title = manifests(files, profile, f"{profile.jobs_folder}/{files.name}_NUMBER"), "the objects"
    else:
        from minpro_megatron.cluster.skypilot import task

        made, title = [task(files, profile, f"{files.name}_NUMBER")], "SkyPilot's task"
    text = yaml.safe_dump_all(made, sort_keys=False, width=120)
    return f"# {title}\n{text}\n# the script of each node\n{job_script(profile, files.num_nodes)}"


def submit(files: JobFiles, profile: Profile, records: Path) -> str:
    """Submits the job; returns its name. Raises UserError, also if an earlier job of the run has not ended."""
    _refuse_a_second_job(files.name, records)
    if profile.executor == "kubernetes":
        from minpro_megatron.cluster import kubeflow

        return kubeflow.submit(files, profile)
    from minpro_megatron.cluster import skypilot

    return skypilot.submit(files, profile, records.parent / "minpro_skypilot" / f"{files.name}_{time.time_ns()}")


def look_up(record: JobRecord) -> JobState:
    """The state of the job. Raises JobError."""
    if record.executor == "kubernetes":
        from minpro_megatron.cluster import kubeflow

        return kubeflow.look_up(record.job_id, record.namespace)
    from minpro_megatron.cluster import skypilot

    return skypilot.look_up(record.job_id)


def cancel(record: JobRecord) -> None:
    """Ends the job without a restart."""
    if record.executor == "kubernetes":
        from minpro_megatron.cluster import kubeflow

        kubeflow.cancel(record.job_id, record.namespace)
        return
    from minpro_megatron.cluster import skypilot

    skypilot.cancel(record.job_id)


def show_logs(record: JobRecord) -> None:
    """Prints the output of the job until its end. Raises UserError with the command that does it, where NeMo-Run does
    not: of a TrainJob it shows only the lines of torchrun's ranks."""
    if record.executor == "kubernetes":
        from minpro_megatron.cluster.kubeflow import logs_command

        raise UserError(f"job {record.job_id}: its output is shown by {logs_command(record.job_id, record.namespace)}")
    from minpro_megatron.cluster import skypilot

    skypilot.show_logs(record.job_id)


def _refuse_a_second_job(name: str, records: Path) -> None:
    earlier = [record for record in all_records(records) if record.name == name and record.is_of_pods]
    if not earlier:
        return
    try:
        state = look_up(earlier[-1])
    except JobError:  # it has been deleted
        return
    if not state.has_ended:
        raise UserError(
            f"name = {name}: job {earlier[-1].job_id} of this name has not ended ({state}); cancel it "
            f"(minpro cancel {name}) or give another name=..."
        )
