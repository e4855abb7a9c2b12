"""The sections of a profile: the settings of each executor, and the kinds of values that they have."""

from pathlib import PurePosixPath
from typing import Annotated

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section

# NeMo-Run uses these in its own command lines without quoting them.
_UNQUOTED = r"[A-Za-z0-9_./@%+=:,-]*"
AbsolutePath = Annotated[str, Field(pattern=rf"^/{_UNQUOTED}$")]
OptionalPath = Annotated[str, Field(pattern=rf"^(/{_UNQUOTED})?$")]
Word = Annotated[str, Field(pattern=rf"^{_UNQUOTED}$")]
# Each of these is on a line of the job's script, quoted.
Line = Annotated[str, Field(pattern=r"^[^\r\n]*$")]
# Names and quantities of Kubernetes.
_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|[kMGTP]i?)?$"
# A word in capital letters is a placeholder of a profile that comes with the project; `submit` refuses it.
DnsLabel = Annotated[str, Field(pattern=rf"^({_LABEL}|[A-Z]+)$")]
DnsName = Annotated[str, Field(pattern=rf"^{_LABEL}(\.{_LABEL})*$")]
OptionalDnsName = Annotated[str, Field(pattern=rf"^({_LABEL}(\.{_LABEL})*|[A-Z]+)?$")]
Quantity = Annotated[str, Field(pattern=rf"{_QUANTITY}|^$")]


def seconds_of(time: str) -> int | None:
    """A time limit in sbatch's format, in seconds; None: there is no limit. A single number is minutes, two numbers are
    minutes and seconds; after days they are hours and so on.

    >>> seconds_of("90"), seconds_of("10:30"), seconds_of("24:00:00"), seconds_of("1-12"), seconds_of("0")
    (5400, 630, 86400, 129600, None)
    """
    if time in ("UNLIMITED", "0"):
        return None
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    first = 3600 if days or len(parts) == 3 else 60
    return int(days or 0) * 86400 + sum(part * first // 60**place for place, part in enumerate(parts))


class SlurmSettings(Section):
    """Options of sbatch, by the names that sbatch uses."""

    account: Line = ""
    partition: Line = ""
    qos: Line = ""
    time: str = Field(
        default="24:00:00",
        pattern=r"^((\d+-)?\d+(:\d+){0,2}|UNLIMITED)$",
        description="limit of one start, [days-]hours:minutes:seconds",
    )
    end_early_s: int = Field(
        default=300,
        ge=0,
        description="SIGTERM is sent this long before the time limit. The trainer saves a checkpoint and the job is "
        "restarted; if it is late it may continue to save until a minute before the limit. 0: the limit ends the job",
    )
    constraint: Line = ""
    exclude: Line = Field(default="", description="nodes to exclude")
    mem: Line = Field(default="0", description="memory per node; 0: all of it; empty: the cluster's default")
    exclusive: bool = True
    cpus_per_task: int = Field(default=0, ge=0, description="CPUs per node; 0: all CPUs of an exclusive node")
    gres: Line = Field(default="", description="GPUs, if the cluster does not know --gpus-per-node")
    interface: Line = Field(default="", description="network interface between the nodes; empty: that of their names")
    additional: dict[Word, Line] = Field(default={}, description="further options of sbatch, name = value")
    srun: list[Line] = Field(default=[], description="further options of srun, such as --no-container-mount-home")

    @model_validator(mode="after")
    def _has_time_before_its_end(self) -> "SlurmSettings":
        limit_s = seconds_of(self.time)
        if limit_s is not None and self.end_early_s >= limit_s:
            raise ValueError(
                f"slurm.end_early_s = {self.end_early_s} must be less than slurm.time = {self.time} ({limit_s} s), or "
                "every start would end at once: raise slurm.time, or set slurm.end_early_s to 0"
            )
        return self


def has_writable(mount: str, folder: PurePosixPath) -> bool:
    """Whether a mount of the container, SOURCE[:TARGET[:FLAGS]], has `folder` under the same path as outside of it, and
    not only to read.

    >>> has_writable("/lustre:/lustre", PurePosixPath("/lustre/mine"))
    True
    >>> [has_writable(mount, PurePosixPath("/a")) for mount in ("/a:/b", "/a:/a:ro,rbind", "/ab", "/a")]
    [False, False, False, True]
    """
    source, *rest = mount.split(":")
    target, flags = rest[0] if rest else source, rest[1].split(",") if len(rest) > 1 else []
    return "ro" not in flags and PurePosixPath(source) == PurePosixPath(target) and folder.is_relative_to(source)


class ContainerSettings(Section):
    """The image of the job's processes. The workspace and the jobs' folder are mounted in any case."""

    image: Line = ""
    mounts: list[Line] = Field(
        default=[], description="SOURCE:TARGET, such as /lustre/data:/lustre/data:ro; with executor = slurm only"
    )


class SshSettings(Section):
    """How the cluster is reached from other machines; without it the profile is for its own login nodes."""

    host: Word
    user: Word
    port: int = Field(default=22, ge=1, le=65535)
    identity: Word = Field(default="", description="private key file; empty: the agent's keys")


class KubernetesSettings(Section):
    """Options of a job on Kubernetes with Kubeflow Trainer."""

    namespace: DnsLabel = "default"
    claim: OptionalDnsName = Field(
        default="",
        description="PersistentVolumeClaim with access mode ReadWriteMany; it is mounted at `workspace` in every pod",
    )
    queue: OptionalDnsName = Field(
        default="", description="LocalQueue of Kueue, which starts the pods of a job together or not at all"
    )
    cpus: Quantity = Field(default="", description="CPUs per pod, such as 96; empty: no request and no limit")
    memory: Quantity = Field(
        default="", description="memory per pod, such as 1500Gi, /dev/shm included; empty: no request and no limit"
    )
    shared_memory: Annotated[str, Field(pattern=_QUANTITY)] = Field(
        default="64Gi", description="size of /dev/shm, through which NCCL and the servers' processes exchange data"
    )
    resources: dict[Word, Quantity] = Field(
        default={}, description="further resources per pod, such as those of an RDMA device plugin"
    )
    annotations: dict[Word, Line] = Field(default={}, description="of the pods, such as those for further networks")
    node_selector: dict[Word, Line] = Field(default={}, description="labels of the machines that may run the pods")
    tolerations: list[dict[Word, Line]] = Field(
        default=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        description="taints of machines that the pods tolerate",
    )
    image_pull_secrets: list[DnsName] = Field(default=[], description="secrets of the image's registry")
    copy_image: Line = Field(
        default="alpine:3.19", description="image of the pod that copies the job's files to the claim: with tar and sh"
    )
    interface: Line = Field(default="", description="network interface between the pods; empty: that of their names")
    end_early_s: int = Field(
        default=300,
        ge=0,
        description="time between SIGTERM and SIGKILL when a pod is ended, 30 s at least; a late trainer may save "
        "until a minute before its end",
    )

    @property
    def grace_s(self) -> int:
        """Seconds between SIGTERM and SIGKILL. A shorter time than Kubernetes' own would not let the roles end."""
        return max(self.end_early_s, 30)


class SkypilotSettings(Section):
    """Options of a managed job of SkyPilot."""

    infra: Word = Field(default="", description="k8s/CONTEXT, or a cloud such as aws/us-east-1")
    accelerator: Word = Field(default="", description="SkyPilot's name of the GPU, such as H100; with GPUs required")
    cpus: Word = Field(default="", description="CPUs per node, such as 64+; empty: SkyPilot's default")
    memory: Word = Field(default="", description="GB of memory per node, such as 512+; empty: SkyPilot's default")
    use_spot: bool = False
    network_tier: Word = Field(default="best", description="best: the machines' fast network, where SkyPilot knows it")
    claim: OptionalDnsName = Field(
        default="",
        description="with infra = k8s/...: PersistentVolumeClaim (ReadWriteMany) that is mounted at `workspace`",
    )
    setup: list[Line] = Field(
        default=[],
        description="commands on every new node, such as those that mount the shared file system at `workspace`",
    )
    interface: Line = Field(default="", description="network interface between the nodes; empty: that of their names")
