"""A run on Kubernetes: a TrainJob of Kubeflow Trainer, sent and observed with NeMo-Run's executor.

NeMo-Run writes the volumes and other options of the pods into the TrainJob's podTemplateOverrides, a field that only
Kubeflow Trainer 2.1 has. Here they are in a TrainingRuntime of the job instead, which every version from 2.0 on reads,
and which also has what a TrainJob cannot say: when all pods are started again.
"""

import hashlib
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_run.core.execution.kubeflow import KubeflowExecutor, KubeflowJobState

from minpro_megatron.cluster.job_files import JobFiles
from minpro_megatron.cluster.job_folder import write_job_folder
from minpro_megatron.cluster.job_script import JOB_VARIABLE, RESTARTS_VARIABLE, SCRIPT_FILE
from minpro_megatron.cluster.profile import Profile
from minpro_megatron.cluster.slurm_job import JOB_PREFIX, JobError, JobState
from minpro_megatron.errors import TO_BE_CONTINUED, UserError

_GROUP, _VERSION, _RUNTIMES = "trainer.kubeflow.org", "v1alpha1", "trainingruntimes"
# Kubeflow Trainer looks for the job and the container of these names, and for the label.
_NODE = "node"
_TRAINER_LABEL = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
_SHARED_MEMORY, _WORKSPACE = "shared-memory", "workspace"
_KILLED = 137  # by SIGKILL, as for too much memory: the job's script could not decide
# JobSet's number has to be finite. What ends the restarts is the job's script, and node 0 after two starts in a row
# without a new checkpoint.
_MAX_RESTARTS = 1_000_000
_NAME_LENGTH = 26  # NeMo-Run cuts the names of TrainJobs after 33 characters, of which it adds 7
_STATES = {
    KubeflowJobState.CREATED: "PENDING",
    KubeflowJobState.UNKNOWN: "PENDING",
    KubeflowJobState.RUNNING: "RUNNING",
    KubeflowJobState.SUCCEEDED: "COMPLETED",
    KubeflowJobState.FAILED: "FAILED",
}


@dataclass(kw_only=True)
class _Executor(KubeflowExecutor):
    """NeMo-Run's executor, which without `connects` only builds manifests and needs neither a cluster nor the package
    kubernetes."""

    connects: bool = True

    def __post_init__(self) -> None:
        if self.connects:
            super().__post_init__()


def manifests(files: JobFiles, profile: Profile, folder: str) -> list[dict[str, Any]]:
    """The TrainingRuntime and the TrainJob of the run, whose files are in `folder` of the claim. NeMo-Run adds a hyphen
    and six characters to the TrainJob's name when it is sent."""
    train_job = _executor(files, profile, connects=False).get_job_body(_name(files), _command(folder))
    return [_runtime(files, profile), train_job]


def submit(files: JobFiles, profile: Profile) -> str:
    """Copies the job's files to the claim and creates both objects; returns the TrainJob's name. Raises UserError."""
    mover = _connected(lambda: _mover(profile))
    folder = f"{profile.jobs_folder}/{files.name}_{time.time_ns()}"
    from kubernetes.client.rest import ApiException

    try:
        with tempfile.TemporaryDirectory() as local:
            write_job_folder(Path(local, "job"), files, profile)
            mover.copy_to_workspace(str(Path(local, "job")), folder, label=_name(files))
        _apply(profile.kubernetes.namespace, _runtime(files, profile))
        job, _ = _executor(files, profile, connects=True).launch(_name(files), _command(folder))
    except ApiException as error:
        raise UserError(
            f"the job was not submitted: Kubernetes answers {error.status} {error.reason}: {_message(error)}"
        ) from None
    return job


def look_up(job: str, namespace: str) -> JobState:
    """The state of the TrainJob. Raises JobError if there is none or the cluster does not answer, and UserError if this
    machine cannot ask it."""
    state = _connected(lambda: _Executor(namespace=namespace)).status(job)
    if state is None:
        raise JobError(
            f"no TrainJob {job} in namespace {namespace}, or no answer: kubectl get trainjobs -n {namespace}"
        )
    return JobState(state=_STATES[state], exit_status=int(state is KubeflowJobState.FAILED))


def cancel(job: str, namespace: str) -> None:
    """Deletes the TrainJob and with it its pods, which get SIGTERM first."""
    _connected(lambda: _Executor(namespace=namespace)).cancel(job)


def logs_command(job: str, namespace: str) -> str:
    """The command that shows the output of all nodes."""
    return f"kubectl logs -n {namespace} -l jobset.sigs.k8s.io/jobset-name={job} --prefix --tail=-1"


def _connected(make: Any) -> Any:
    if find_spec("kubernetes") is None:
        raise UserError(
            "executor = kubernetes needs the package kubernetes: pip install 'minpro-megatron[kubernetes]' "
            "-c environment/constraints.txt"
        )
    if shutil.which("kubectl") is None:
        raise UserError("executor = kubernetes needs kubectl, with which NeMo-Run copies the job's files: install it")
    from kubernetes.config import ConfigException

    try:
        return make()
    except ConfigException as error:
        raise UserError(f"executor = kubernetes: {error}: `kubectl cluster-info` must reach the cluster") from None


def _executor(files: JobFiles, profile: Profile, connects: bool) -> _Executor:
    """The TrainJob. It has no option that NeMo-Run would write into podTemplateOverrides."""
    settings = profile.kubernetes
    extra = dict(settings.resources)
    return _Executor(
        connects=connects,
        namespace=settings.namespace,
        image=profile.container.image,
        num_nodes=files.num_nodes,
        nprocs_per_node=1,  # the node's own process starts its roles
        gpus_per_node=profile.topology.gpus_per_node or None,
        cpu_requests=settings.cpus or None,
        cpu_limits=settings.cpus or None,
        memory_requests=settings.memory or None,
        memory_limits=settings.memory or None,
        extra_resource_requests=extra,
        extra_resource_limits=extra,
        labels=_labels(files) | ({"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}),
        env_list=[
            _from_pod(JOB_VARIABLE, "metadata.labels['jobset.sigs.k8s.io/jobset-name']"),
            _from_pod(RESTARTS_VARIABLE, "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"),
        ],
        train_job_basename=_name(files),
        spec_kwargs={"runtimeRef": {"apiGroup": _GROUP, "kind": "TrainingRuntime", "name": _name(files)}},
    )


def _mover(profile: Profile) -> _Executor:
    """Copies the job's files, in a pod that mounts the claim at the same path as the pods of the job."""
    settings = profile.kubernetes
    return _Executor(
        namespace=settings.namespace,
        workdir_pvc=settings.claim,
        workdir_pvc_path=profile.workspace,
        data_mover_image=settings.copy_image,
        tolerations=[dict(one) for one in settings.tolerations],
        image_pull_secrets=list(settings.image_pull_secrets),
    )


def _command(folder: str) -> list[str]:
    return ["/bin/bash", f"{folder}/{SCRIPT_FILE}"]


def _runtime(files: JobFiles, profile: Profile) -> dict[str, Any]:
    """The TrainingRuntime: the pods' volumes and machines, and the restarts.

    A pod is never started again by itself: all nodes of a run start together. Exit status 75 of the job's script, a
    killed pod and a lost machine let JobSet create all pods again, after the old ones have ended; any other status ends
    the job.
    """
    settings = profile.kubernetes
    ends = {"containerName": _NODE, "operator": "NotIn", "values": [TO_BE_CONTINUED, _KILLED]}
    job: dict[str, Any] = {
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": ends}]},
        "template": {"spec": _pod(profile)},
    }
    if settings.annotations:
        job["template"]["metadata"] = {"annotations": dict(settings.annotations)}
    ended = {"name": "ended", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": f"{_GROUP}/{_VERSION}",
        "kind": "TrainingRuntime",
        "metadata": {"name": _name(files), "namespace": settings.namespace, "labels": _labels(files)},
        "spec": {
            # no `torch`: it would set variables of torchrun, which the launcher itself calls
            "mlPolicy": {"numNodes": files.num_nodes},
            "template": {
                "spec": {
                    "failurePolicy": {
                        "maxRestarts": _MAX_RESTARTS,
                        "restartStrategy": "BlockingRecreate",
                        "rules": [ended],
                    },
                    "replicatedJobs": [
                        {"name": _NODE, "template": {"metadata": {"labels": _TRAINER_LABEL}, "spec": job}}
                    ],
                }
            },
        },
    }


def _pod(profile: Profile) -> dict[str, Any]:
    """The specification of a node's pod: its container, volumes and machine."""
    settings = profile.kubernetes
    volumes = {
        _WORKSPACE: {"persistentVolumeClaim": {"claimName": settings.claim}},
        _SHARED_MEMORY: {"emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
    }
    mounts = {_WORKSPACE: profile.workspace, _SHARED_MEMORY: "/dev/shm"}
    container: dict[str, Any] = {
        "name": _NODE,
        "image": profile.container.image,
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
    }
    if settings.resources:  # RDMA registers pages of memory that must stay where they are
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace_s,
        "containers": [container],
        "volumes": [{"name": name, **source} for name, source in volumes.items()],
        "tolerations": [dict(one) for one in settings.tolerations],
    }
    if settings.node_selector:
        pod["nodeSelector"] = dict(settings.node_selector)
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return pod


def _apply(namespace: str, runtime: dict[str, Any]) -> None:
    """Creates the TrainingRuntime, or replaces that of an earlier job of the run."""
    from kubernetes.client import CustomObjectsApi
    from kubernetes.client.rest import ApiException

    api, place = CustomObjectsApi(), (_GROUP, _VERSION, namespace, _RUNTIMES)
    try:
        api.create_namespaced_custom_object(*place, runtime)
    except ApiException as error:
        if error.status != 409:
            raise
        name = runtime["metadata"]["name"]
        old = api.get_namespaced_custom_object(*place, name)
        runtime["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]  # type: ignore[index]
        api.replace_namespaced_custom_object(*place, name, runtime)


def _name(files: JobFiles) -> str:
    """The run's name in the form of Kubernetes, with room for what NeMo-Run adds to it."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{JOB_PREFIX}{files.name}".lower()).strip("-")
    if len(name) <= _NAME_LENGTH:
        return name
    return f"{name[: _NAME_LENGTH - 7].strip('-')}-{hashlib.sha256(files.name.encode()).hexdigest()[:6]}"


def _labels(files: JobFiles) -> dict[str, str]:
    return {"minpro-run": _name(files)}


def _from_pod(name: str, field: str) -> dict[str, Any]:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}


def _message(error: Any) -> str:
    return " ".join(str(error.body or "").split())[:500]
