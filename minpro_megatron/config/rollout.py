"""Where prompts come from, how responses are sampled, which servers do it and how stale they may be."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.config.instructions import instruction_text
from minpro_megatron.config.rewards import RIGHT_REWARD


class DataConfig(Section):
    """JSON Lines of `{"id", "source", "prompt", "answer"}`, and optionally `"pass_rate"` (0 to 1) and `"prefix"`."""

    train_file: str
    heldout_file: str
    accept_changed_inputs: bool = Field(
        default=False,
        description="a run continues although the content of its data files, benchmarks or model files is not that of "
        "its first start; its report then says which changed and when",
    )
    instruction: str = Field(
        default="none",
        description="what each question is wrapped in: none, dapo, boxed (see config/instructions.py), or a text with "
        "{question} in it",
    )
    chat_template: bool = Field(
        default=False,
        description="the question becomes the user's turn in the model's chat template; false: a base model's raw text",
    )
    chat_template_arguments: dict[str, str | int | float | bool] = Field(
        default={}, description='variables of the chat template, such as {"enable_thinking": false}'
    )
    source_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="share of the groups that each source of train_file gets, in any unit, all sources named; 0 leaves "
        "one out; empty: every prompt of the file once an epoch",
    )
    min_pass_rate: float = Field(
        default=0, ge=0, le=1, description="training prompts with a lower pass_rate are left out"
    )
    max_pass_rate: float = Field(
        default=1,
        ge=0,
        le=1,
        description="those with a higher one too; with either bound set, also those without pass_rate",
    )
    curriculum: Literal["none", "easy_first"] = Field(
        default="none",
        description="easy_first: in the first epoch (of each source, with source_weights) prompts of a high pass_rate "
        "come first and those without one last; later epochs are shuffled",
    )

    @property
    def selects_by_pass_rate(self) -> bool:
        return self.min_pass_rate > 0 or self.max_pass_rate < 1

    @model_validator(mode="after")
    def _can_be_followed(self) -> "DataConfig":
        instruction_text(self.instruction)
        if self.min_pass_rate > self.max_pass_rate:
            raise ValueError(
                f"min_pass_rate = {self.min_pass_rate} exceeds max_pass_rate = {self.max_pass_rate}: no prompt is "
                "left; lower the one or raise the other"
            )
        if self.source_weights and not any(self.source_weights.values()):
            raise ValueError(f"source_weights = {self.source_weights} are all 0: no prompt is left; raise one of them")
        if self.chat_template_arguments and not self.chat_template:
            raise ValueError(
                f"chat_template_arguments = {self.chat_template_arguments} without chat_template: set chat_template to "
                "true, or leave them out"
            )
        return self


class SamplingConfig(Section):
    """How training responses are sampled. There is no top-p or top-k on purpose: the trainer's log-probs are of
    the untruncated distribution, so truncated sampling would make every ratio wrong."""

    temperature: float = Field(default=1.0, gt=0)
    max_prompt_tokens: int = Field(default=2048, ge=1)
    max_response_tokens: int = Field(default=20480, ge=1)
    extra_stop_tokens: list[str] = Field(
        default=[],
        description="special tokens that end a response beside the model's own: a base model that is given a chat "
        "template ends its turn with <|im_end|>, which its config does not name",
    )


class StalenessConfig(Section):
    """How far the weights that sample may lie behind those that train, in policy versions.

    `delay`: batch k is sampled with version max(0, k - delay_steps) and consumed at global step k: every token is that
    old, no more and no less. `bounded`: servers never wait; weights change under responses that are under way, and
    a group is consumed while no token of it is older than `max_staleness`.
    """

    mode: Literal["delay", "bounded"] = "delay"
    delay_steps: int = Field(default=2, ge=0, description="of mode delay")
    max_staleness: int = Field(default=2, ge=1, description="of mode bounded")
    behavior_log_probs: Literal["trainer", "rollout"] = Field(
        default="trainer",
        description="trainer: computed under the very weights that sampled the token; rollout: the servers' own, which "
        "saves the pass and puts their engine mismatch into every ratio: a prefix minimum is very sensitive to it",
    )


class ServerConfig(Section):
    """The rollout servers: those that the role `serve` starts on this machine, or others by their addresses."""

    engine: Literal["sglang", "reference"] = Field(
        default="sglang",
        description="reference: transformers on the CPU, one response at a time, the same tokens for the same seed; "
        "speaks the same HTTP; for tests and small studies",
    )
    urls: list[str] = Field(
        default=[],
        description="servers started by somebody else, such as http://10.0.0.7:30000; `serve` then starts none",
    )
    api_key_variable: str = Field(
        default="",
        description="name of the environment variable that holds the servers' API key; empty: a random one in the run "
        "folder for servers that the run starts, none for those of urls",
    )
    placement: Literal["disaggregated"] = Field(
        default="disaggregated", description="the servers have GPUs of their own, none of the trainer's"
    )
    count: int = Field(default=1, ge=1, description="servers to start; ignored where urls are given")
    host: str = Field(default="127.0.0.1", description="listening address; loopback unless told otherwise")
    first_port: int = Field(default=0, ge=0, le=65535, description="0: free ports are chosen")
    tensor_parallel: int = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_total_tokens: int | None = Field(default=None, ge=1, description="KV cache size; None: SGLang decides")
    max_running_requests: int = Field(default=256, ge=1)
    start_timeout_s: float = Field(
        default=900, gt=0, description="longest start of a server until it generates; a longer one ends the run"
    )
    request_timeout_s: float = Field(default=1800, gt=0, description="for the whole answer to one request")
    queue_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="longest wait of a training group for a place at a server, behind earlier groups or while no "
        "server holds the current weights; a longer one ends the run; None: no limit but that for a run without "
        "servers; evaluation groups wait behind all training groups, without a limit",
    )
    health_interval_s: float = Field(default=5, gt=0, description="between two looks at a server")
    unhealthy_after_s: float = Field(default=60, gt=0, description="without an answer: no more work, then a restart")
    generation_timeout_s: float = Field(
        default=300,
        gt=0,
        description="a server that answers but has generated no token for this long, although it is asked for one "
        "every health_interval_s, hangs and is started again; not counted while weights are sent to it; from the first "
        "token that does not come within 30 s on, it is given neither work nor weights",
    )
    max_restarts: int = Field(
        default=10,
        ge=0,
        description="of one server within restart_window_s; after one more failure the run goes on without it until "
        "one of them is that long ago, and ends if no other server of the run is left",
    )
    restart_window_s: float = Field(default=21600, gt=0, description="time over which max_restarts counts")
    slow_factor: float = Field(
        default=3, gt=1, description="a server this much slower a token than the median gets work last, and is named"
    )

    @property
    def max_requests_under_way(self) -> int:
        """Requests that one server is given at a time: more than run at once, so that its queue always holds the next
        one when responses of different lengths end."""
        return max(1, round(1.25 * self.max_running_requests))

    @field_validator("placement", mode="before")
    @classmethod
    def _not_colocated(cls, value: Any) -> Any:
        if value == "colocated":
            raise ValueError(
                "trainer and servers on the same GPUs are not supported: they work at the same time, and neither gives "
                "its memory up for the other; set disaggregated and share the GPUs out between parallel and server, as "
                "recipes.qwen3_30b_a3b:minpro_one_machine does with eight"
            )
        return value


class CollectorConfig(Section):
    """The collector's own HTTP interface, which only the trainer's rank 0 uses."""

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535, description="0: a free port is chosen")
    reward: str = Field(
        default="calculator",
        description="calculator, dapo, dapo_boxed, math, or a function of one's own: package.module:function",
    )
    reward_by_source: dict[str, str] = Field(
        default={}, description="another one for the prompts of some sources (the prompt files' source)"
    )
    right_reward: float = Field(
        default=RIGHT_REWARD,
        description="a response counts as right from this reward on, in the accuracy of training and in every "
        "evaluation; the graders above give 1 for a right response",
    )
    reward_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="limit of processor time for grading one response; of wall time it may take ten times as long. A "
        "grade that fails twice leaves its group out of training",
    )
    reward_workers: int = Field(default=1, ge=1)
    journal_ratios: bool = Field(
        default=True, description="also store what the policy gave each token at the update: 4 bytes a token"
    )
    journal_keep_steps: int = Field(
        default=50, ge=0, description="global steps whose tokens and log-probs stay in the journal; 0: all"
    )
    journal_keep_routes: bool = Field(
        default=False,
        description="with model.routing_replay = rollout: keep the servers' routes as long as the tokens, to train on "
        "the journal again (debug.journal) or to resume from an earlier checkpoint than the latest; false: they are "
        "removed when a checkpoint includes the step that consumed them",
    )


class BenchmarkConfig(Section):
    """A file of prompts that is evaluated beside the held-out ones."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="its name in metrics: evaluation/.../<name>")
    file: str = Field(description="JSON Lines as data.heldout_file's")
    samples_per_prompt: int = Field(default=2, ge=1)
    num_prompts: int | None = Field(default=None, ge=1, description="the first ones of the file; None: all")


class EvaluationConfig(Section):
    """pass@1 on held-out prompts and benchmarks at the first and the last policy version (and every `every_steps`).

    Weights are not replaced under an evaluation: with many samples the trainer waits. Samples are requested in groups
    of batch.responses_per_prompt, after the training groups. An evaluation that fails raises an alarm and has no score.
    """

    num_prompts: int = Field(default=128, ge=1)
    samples_per_prompt: int = Field(default=8, ge=1)
    every_steps: int = Field(default=0, ge=0, description="also at each multiple of this policy version; 0: never")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    benchmarks: list[BenchmarkConfig] = Field(
        default=[], description='such as [{"name": "aime24", "file": "data/aime24.jsonl", "samples_per_prompt": 8}]'
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "EvaluationConfig":
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"benchmarks: the names {names} must differ")
        return self
