"""A profile describes a cluster. There is one TOML file per cluster, written once."""

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from minpro_megatron.cluster.paths import CHECKOUT
from minpro_megatron.config.base import Section
from minpro_megatron.errors import UserError
from minpro_megatron.launch.topology import TopologySettings

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
# The words in capital letters in cluster/profiles, as a part of a path or the whole value.
_PLACEHOLDER = re.compile(r"(?<![\w-])(ACCOUNT|PARTITION|PROJECT|REGISTRY|CHECKOUT)(?![\w-])")
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL)")
# NeMo-Run uses these in its own command lines without quoting them.
_UNQUOTED = r"[A-Za-z0-9_./@%+=:,-]*"
AbsolutePath = Annotated[str, Field(pattern=rf"^/{_UNQUOTED}$")]
OptionalPath = Annotated[str, Field(pattern=rf"^(/{_UNQUOTED})?$")]
Word = Annotated[str, Field(pattern=rf"^{_UNQUOTED}$")]
# Each of these is on a line of the job's script, quoted.
Line = Annotated[str, Field(pattern=r"^[^\r\n]*$")]


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


class ContainerSettings(Section):
    """The image of the job's processes (Pyxis). The workspace is mounted in any case."""

    image: Line = ""
    mounts: list[Line] = Field(default=[], description="SOURCE:TARGET, such as /lustre/data:/lustre/data:ro")


class SshSettings(Section):
    """How the cluster is reached from other machines; without it the profile is for its own login nodes."""

    host: Word
    user: Word
    port: int = Field(default=22, ge=1, le=65535)
    identity: Word = Field(default="", description="private key file; empty: the agent's keys")


class Profile(Section):
    """How jobs are submitted, and where they run."""

    executor: Literal["slurm", "local"] = "slurm"
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
    container: ContainerSettings = ContainerSettings()
    ssh: SshSettings | None = None
    topology: TopologySettings = TopologySettings()

    @property
    def jobs_folder(self) -> str:
        return self.job_dir or str(PurePosixPath(self.workspace) / "jobs")

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
    def _fits_together(self) -> "Profile":
        if self.executor == "local" and self.ssh is not None:
            raise ValueError("executor = local runs on this machine: remove [ssh], or set executor to slurm")
        return self


def read_profile(path: Path, assignments: list[str]) -> Profile:
    """The profile in a TOML file, with `section.key=value` changes. Raises UserError, one line per problem."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--profile {path}: {error.strerror}; see cluster/profiles for examples") from None
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
