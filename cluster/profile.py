"""A profile describes a cluster. There is one TOML file per cluster, written once."""

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from minpro_megatron.cluster.paths import CHECKOUT
from minpro_megatron.cluster.sections import (
    AbsolutePath,
    ContainerSettings,
    KubernetesSettings,
    Line,
    OptionalPath,
    SkypilotSettings,
    SlurmSettings,
    SshSettings,
    has_writable,
)
from minpro_megatron.config.base import Section
from minpro_megatron.errors import UserError
from minpro_megatron.launch.topology import TopologySettings

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
EXAMPLES = Path(__file__).parent / "profiles"
# The words in capital letters in cluster/profiles, as a part of a path or the whole value.
_PLACEHOLDER = re.compile(r"(?<![\w-])(ACCOUNT|PARTITION|PROJECT|REGISTRY|CHECKOUT|NAMESPACE|CLAIM|CONTEXT)(?![\w-])")
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)")
# The sections that each executor reads, besides those of all executors.
_SECTIONS = {
    "slurm": {"slurm", "container", "ssh"},
    "kubernetes": {"kubernetes", "container"},
    "skypilot": {"skypilot", "container"},
    "local": set[str](),
}


class Profile(Section):
    """How jobs are submitted, and where they run."""

    executor: Literal["slurm", "kubernetes", "skypilot", "local"] = "slurm"
    gpu: str = Field(default="h100-80gb", description="kind of the nodes' GPUs, as the planner calls it")
    workspace: AbsolutePath = Field(
        description="folder on the file system that all nodes share; relative paths of settings, and paths inside this "
        "checkout, refer to it: models, data, runs. With executor = local the default is this checkout"
    )
    job_dir: OptionalPath = Field(default="", description="scripts, code and logs of jobs; workspace/jobs if empty")
    python: str = Field(
        default="python",
        pattern=r"^[^\r\n]*python[^\r\n]*$",
        description="in the container or on the nodes; with "
        "executor = local the default is the Python that runs `submit`",
    )
    restarts: int = Field(
        default=3,
        ge=0,
        description="the number of restarts of a failed job, which resumes from its last checkpoint; starts that saved "
        "before their time limit do not count, and after two consecutive starts without a new checkpoint it ends",
    )
    environment: dict[str, Line] = Field(default={}, description="variables of all processes; no secrets")
    secrets_file: OptionalPath = Field(
        default="", description="shell file on the cluster that exports API keys; readable only by you"
    )
    slurm: SlurmSettings = SlurmSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    skypilot: SkypilotSettings = SkypilotSettings()
    container: ContainerSettings = ContainerSettings()
    ssh: SshSettings | None = None
    topology: TopologySettings = TopologySettings()

    @property
    def jobs_folder(self) -> str:
        return self.job_dir or str(PurePosixPath(self.workspace) / "jobs")

    @property
    def mounts(self) -> list[str]:
        """The mounts of the container: those given, and the workspace and the jobs' folder, where the nodes state their
        exit statuses, unless a mount has them already."""
        mounts = list(self.container.mounts)
        for folder in map(PurePosixPath, (self.workspace, self.jobs_folder)):
            if not any(has_writable(mount, folder) for mount in mounts):
                mounts.append(f"{folder}:{folder}")
        return mounts

    @field_validator("environment")
    @classmethod
    def _variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name}: names must be capital letters, digits and _ (NeMo-Run writes them so)")
            if _SECRET.search(name):
                raise ValueError(
                    f"{name} looks like a secret, and this is written to the job's script: export it in secrets_file"
                )
        return value

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_this_machine(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("executor") == "local":
            return {"workspace": str(CHECKOUT), "python": sys.executable} | values
        return values

    @model_validator(mode="after")
    def _has_the_sections_of_its_executor(self) -> "Profile":
        others = set().union(*_SECTIONS.values()) - _SECTIONS[self.executor]
        if given := sorted(others & self.model_fields_set):
            names = ", ".join(f"[{name}]" for name in given)
            raise ValueError(f"executor = {self.executor} does not use {names}: remove it, or change executor")
        return self

    @model_validator(mode="after")
    def _has_what_its_executor_needs(self) -> "Profile":
        if found := [*self._problems_of_pods(), *self._problems_of_skypilot()]:
            raise ValueError("; ".join(found))
        return self

    def _problems_of_pods(self) -> Iterator[str]:
        if self.executor not in ("kubernetes", "skypilot"):
            return
        if not self.container.image:
            yield f"container.image is missing: with executor = {self.executor} every node runs an image"
        if self.container.mounts:
            yield f"container.mounts is not used with executor = {self.executor}, where a claim is mounted: remove it"
        if not PurePosixPath(self.jobs_folder).is_relative_to(self.workspace):
            yield f"job_dir = {self.job_dir} must be inside workspace = {self.workspace}, which all nodes mount"
        if self.executor == "kubernetes" and not self.kubernetes.claim:
            yield "kubernetes.claim is missing: name a PersistentVolumeClaim that all pods can write (ReadWriteMany)"

    def _problems_of_skypilot(self) -> Iterator[str]:
        if self.executor != "skypilot":
            return
        sky = self.skypilot
        on_kubernetes = sky.infra.startswith(("k8s", "kubernetes"))
        if not sky.infra:
            yield "skypilot.infra is missing: k8s/CONTEXT, or a cloud such as aws/us-east-1"
        elif not on_kubernetes and sky.claim:
            yield f"skypilot.claim = {sky.claim} needs skypilot.infra = k8s/...: mount a file system in skypilot.setup"
        elif not sky.claim and not sky.setup:
            yield (
                f"skypilot.setup is empty: give the commands that mount the shared file system at {self.workspace}"
                + (", or skypilot.claim" if on_kubernetes else "")
            )
        if self.topology.gpus_per_node and not sky.accelerator:
            yield (
                f"skypilot.accelerator is missing for topology.gpus_per_node = {self.topology.gpus_per_node}: give "
                "SkyPilot's name of the GPU, such as H100"
            )


def read_profile(path: Path, assignments: list[str]) -> Profile:
    """The profile in a TOML file, with `section.key=value` changes. Raises UserError, one line per problem."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--profile {path}: {error.strerror}; {EXAMPLES} has examples") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--profile {path}: not TOML: {error}") from None
    for assignment in assignments:
        _assign(values, assignment)
    try:
        return Profile.model_validate(values)
    except ValidationError as error:
        raise UserError(f"--profile {path}: {_problem(entry)}" for entry in error.errors()) from None


def refuse_placeholders(profile: Profile, path: Path) -> None:
    """Raises UserError with a line for each value that still has a placeholder of the profiles that come with the
    project: a word in capital letters."""
    found = [f"{name} = {value!r}" for name, value in _texts(profile.model_dump()) if _PLACEHOLDER.search(value)]
    if found:
        raise UserError(
            f"--profile {path}: {line}: replace the word in capital letters by that of your cluster" for line in found
        )


def _texts(values: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _texts(value, f"{name}.{key}" if name else key)
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, name)
    elif isinstance(values, str):
        yield name, values


def _assign(values: dict[str, Any], assignment: str) -> None:
    path, separator, text = assignment.partition("=")
    *sections, key = path.strip().split(".")
    if not (separator and key):
        raise UserError(f"--set {assignment!r}: expected section.key=value, such as slurm.time=02:00:00")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {assignment!r}: {section} is not a section")
    try:  # numbers and similar values are read from text if the setting has such a type
        values[key] = json.loads(text) if text[:1] in ('"', "[", "{") else text
    except json.JSONDecodeError:
        raise UserError(f"--set {assignment!r}: what begins with {text[0]} must be JSON") from None


def _problem(entry: Any) -> str:
    where = ".".join(str(part) for part in entry["loc"]) or "profile"
    shown = "" if isinstance(entry["input"], dict | Section) else f" (got {entry['input']!r})"
    return f"{where}: {entry['msg'].removeprefix('Value error, ')}{shown}"
