"""The environment of the episodes: what answers the policy between its turns."""

from typing import Literal

from pydantic import Field, model_validator

from minpro_megatron.config.base import Section

NO_ENVIRONMENT = "none"
PYTHON_TOOL = "python_tool"


class PythonToolConfig(Section):
    """The Python tool: runs the code that the policy writes, and gives it what the code prints."""

    sandbox: Literal["isolated", "service", "none"] = Field(
        default="isolated",
        description="Where the code runs. isolated: in a process without network, in Linux namespaces of its own, "
        "which see only this machine's Python and an empty folder; the run does not start where that is not possible. "
        "service: at the sandbox service of environment.python_tool.url. none: in a process with the limits below, but "
        "with the files and the network of the collector's user, which is only for code that you trust.",
    )
    url: str = Field(
        default="",
        description="Address of a sandbox service that takes SandboxFusion's run_code requests, such as "
        "http://host:8080/run_code.",
    )
    timeout_s: float = Field(default=10.0, gt=0, description="Limit in seconds for the code of one call.")
    memory_mb: int = Field(default=1024, ge=64, description="Limit of memory in MiB for each process of a call.")
    max_processes: int = Field(default=16, ge=1, description="Limit of processes and threads of a call.")
    max_file_mb: int = Field(default=16, ge=1, description="Limit of the size in MiB of all files that a call writes.")
    max_output_chars: int = Field(
        default=12000, ge=1, description="Characters of a call's output that the policy receives; the rest is cut."
    )
    max_calls_per_turn: int = Field(
        default=1, ge=1, description="Calls of one turn that are run; further ones are ignored."
    )
    workers: int = Field(default=16, ge=1, description="Number of calls that run at the same time.")

    @model_validator(mode="after")
    def _service_has_an_address(self) -> "PythonToolConfig":
        if (self.sandbox == "service") != bool(self.url):
            raise ValueError(
                f"sandbox = {self.sandbox} with url = {self.url!r}: the address of the service belongs to sandbox = "
                "service and to no other; set both, or neither"
            )
        return self


class EnvironmentConfig(Section):
    """What answers the policy's turns in an episode. The answers are given tokens: no loss sees them."""

    name: str = Field(
        default=NO_ENVIRONMENT,
        description="Environment: none (a response is one turn), python_tool, or your own class as "
        "package.module:Class.",
    )
    role: Literal["tool", "user"] = Field(
        default="tool", description="Role of the answers in the model's chat template."
    )
    timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Limit in seconds for one answer of your own environment. If there is none by then, or the "
        "environment raises an error, the group is excluded from training. The Python tool has limits of its own.",
    )
    max_answer_tokens: int = Field(
        default=4096, ge=1, description="Maximum length of an answer in tokens; the rest of its text is cut."
    )
    python_tool: PythonToolConfig = PythonToolConfig()

    @property
    def enabled(self) -> bool:
        return self.name != NO_ENVIRONMENT
