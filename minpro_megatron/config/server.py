"""The rollout servers."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.config.library_settings import ServerArguments


class ServerConfig(Section):
    """The rollout servers: those that the role `serve` starts on this machine, or external servers by their
    addresses."""

    engine: Literal["sglang", "reference"] = Field(
        default="sglang",
        description="Server program: sglang, or reference, a server for tests and small studies with the same HTTP "
        "interface, which runs transformers on the CPU, one response at a time, and samples the same tokens for the "
        "same seed.",
    )
    urls: list[str] = Field(
        default=[],
        description="Addresses of external servers, which the run does not start, such as http://10.0.0.7:30000; "
        "`serve` then starts none.",
    )
    api_key_variable: str = Field(
        default="",
        description="Name of the environment variable that holds the servers' API key. Empty: servers that the run "
        "starts use a random key from the run folder, and external servers get no key.",
    )
    placement: Literal["disaggregated", "shared"] = Field(
        default="disaggregated",
        description="Placement of the servers. disaggregated: they use other GPUs than the trainer, and both work at "
        "the same time. shared: they use the trainer's GPUs, on one machine, in turns: the servers sample all that "
        "their version has to sample and release their memory, then the trainer takes its states from host memory and "
        "trains. It needs staleness.mode = delay.",
    )
    count: int = Field(default=1, ge=1, description="Number of servers to start; ignored if urls is set.")
    host: str = Field(
        default="127.0.0.1",
        description="Address on which the servers listen. The default, loopback, is not reachable from other machines.",
    )
    first_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Port of the first server; the next ones use the following ports. 0 selects free ports.",
    )
    tensor_parallel: int = Field(default=1, ge=1, description="Tensor-parallel degree of each server.")
    expert_parallel: int = Field(
        default=1,
        ge=1,
        description="Expert-parallel degree of each server: 1, or tensor_parallel, with which each GPU has whole "
        "experts.",
    )
    memory_fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Fraction of a GPU's memory for a server's weights and KV cache together; null lets SGLang decide.",
    )
    device: Literal["cpu", "cuda"] = Field(default="cuda", description="Device on which the servers compute.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Data type of the servers' weights; it should be model.dtype."
    )
    max_total_tokens: int | None = Field(
        default=None, ge=1, description="Size of a server's KV cache in tokens; null lets SGLang decide."
    )
    max_running_requests: int = Field(
        default=256, ge=1, description="Maximum number of requests that a server processes at the same time."
    )
    arguments: ServerArguments = Field(
        default={},
        description="Further options of SGLang's server, by their names with underscores, such as "
        "server.arguments.chunked_prefill_size=4096 on the command line; they replace the values that this project "
        "sets. true gives --option, false --no-option, null leaves the option out, and a list gives several values. "
        "Options that another setting decides are refused. The planner does not know them.",
    )
    start_timeout_s: float = Field(
        default=900,
        gt=0,
        description="Maximum time in seconds from the start of a server until it generates; exceeding it ends the run.",
    )
    request_timeout_s: float = Field(
        default=1800, gt=0, description="Timeout in seconds for the complete response to one request."
    )
    queue_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Maximum time in seconds for which a training group waits for a free server, behind earlier groups "
        "or while no server has the current weights; exceeding it ends the run. null: no limit other than that of a "
        "run without servers. Evaluation groups wait behind all training groups, without a limit.",
    )
    health_interval_s: float = Field(default=5, gt=0, description="Seconds between two health checks of a server.")
    unhealthy_after_s: float = Field(
        default=60,
        gt=0,
        description="A server that has not answered for this many seconds gets no more work and is restarted.",
    )
    generation_timeout_s: float = Field(
        default=300,
        gt=0,
        description="A server that answers but has generated no token for this many seconds, although every health "
        "check asks for one, counts as hung and is restarted. Time during which weights are sent to it does not count. "
        "After the first token that takes longer than 30 s, it gets neither work nor weights.",
    )
    max_restarts: int = Field(
        default=10,
        ge=0,
        description="Maximum number of restarts of one server within restart_window_s. After one more failure the run "
        "continues without the server until the oldest of these restarts is outside the window; it ends if no other "
        "server is left.",
    )
    restart_window_s: float = Field(
        default=21600, gt=0, description="Time in seconds over which restarts are counted for max_restarts."
    )
    slow_factor: float = Field(
        default=3,
        gt=1,
        description="A server that takes more than this multiple of the median time per token gets work only when the "
        "others are full, and is logged.",
    )

    @property
    def max_requests_under_way(self) -> int:
        """The number of requests sent to one server at a time. It exceeds the number that runs at the same time, so
        that the server's queue is not empty when a response ends."""
        return max(1, round(1.25 * self.max_running_requests))

    @property
    def takes_turns(self) -> bool:
        """Whether trainer and servers share their GPUs."""
        return self.placement == "shared"

    @model_validator(mode="after")
    def _settings_of_the_engine(self) -> "ServerConfig":
        if self.expert_parallel not in (1, self.tensor_parallel):  # SGLang 0.5.23 refuses it too, in the server's log
            raise ValueError(
                f"expert_parallel = {self.expert_parallel} must be 1 or tensor_parallel = {self.tensor_parallel}"
            )
        changed = {"memory_fraction": None, "expert_parallel": 1, "arguments": {}}
        given = [name for name, default in changed.items() if getattr(self, name) != default]
        if given and (self.urls or self.engine != "sglang"):
            why = "servers at urls are not started by the run" if self.urls else f"engine = {self.engine}"
            raise ValueError(f"{given[0]} is for the SGLang servers that a run starts, and {why}; remove it")
        return self

    @field_validator("placement", mode="before")
    @classmethod
    def _not_colocated(cls, value: Any) -> Any:
        if value == "colocated":
            raise ValueError("trainer and servers on the same GPUs are called shared here; set shared")
        return value
