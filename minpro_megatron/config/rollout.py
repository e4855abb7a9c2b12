"""Where prompts come from, how responses are sampled, which servers sample them and how stale they may be."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from minpro_megatron.config.base import Section
from minpro_megatron.config.instructions import instruction_text
from minpro_megatron.config.rewards import RIGHT_REWARD


class DataConfig(Section):
    """The prompts: JSON Lines files of `{"id", "source", "prompt", "answer"}`, and optionally `"pass_rate"` (0 to 1)
    and `"prefix"`."""

    train_file: str = Field(description="JSON Lines file of the prompts that are trained on.")
    heldout_file: str = Field(description="JSON Lines file of the held-out prompts that evaluations use.")
    accept_changed_inputs: bool = Field(
        default=False,
        description="Resume the run although the content of its data files, benchmarks or model files has changed "
        "since its first start. The report then lists what changed and when.",
    )
    instruction: str = Field(
        default="none",
        description="Instruction that surrounds each question: none, dapo, boxed (see config/instructions.py), or a "
        "text that contains {question}.",
    )
    chat_template: bool = Field(
        default=False,
        description="Present the question as the user's turn in the model's chat template; false: as plain text, for a "
        "base model.",
    )
    chat_template_arguments: dict[str, str | int | float | bool] = Field(
        default={}, description='Variables of the chat template, such as {"enable_thinking": false}.'
    )
    source_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="Relative weight of each source of train_file among the prompt groups; all sources must be named, "
        "and 0 excludes one. Empty: every prompt of the file is used once per epoch.",
    )
    min_pass_rate: float = Field(
        default=0, ge=0, le=1, description="Training prompts with a lower pass_rate are excluded."
    )
    max_pass_rate: float = Field(
        default=1,
        ge=0,
        le=1,
        description="Training prompts with a higher pass_rate are excluded. If either bound is set, prompts without a "
        "pass_rate are excluded too.",
    )
    curriculum: Literal["none", "easy_first"] = Field(
        default="none",
        description="Order of the prompts. easy_first: in the first epoch (of each source, with source_weights) "
        "prompts with a high pass_rate come first and those without one last; later epochs are shuffled. none: every "
        "epoch is shuffled.",
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
                "true, or remove them"
            )
        return self


class SamplingConfig(Section):
    """How training responses are sampled. Top-p and top-k are deliberately missing: the trainer's log-probs are those
    of the untruncated distribution, so truncated sampling would make every ratio wrong."""

    temperature: float = Field(
        default=1.0, gt=0, description="Sampling temperature of training responses; log-probs use it too."
    )
    max_prompt_tokens: int = Field(default=2048, ge=1, description="Maximum length of a prompt in tokens.")
    max_response_tokens: int = Field(
        default=20480, ge=1, description="Maximum length of a response in tokens; longer ones are truncated."
    )
    extra_stop_tokens: list[str] = Field(
        default=[],
        description="Special tokens that end a response in addition to those of the model's config. A base model with "
        "a chat template ends its turn with <|im_end|>, for example, which its config does not list.",
    )


class StalenessConfig(Section):
    """How many policy versions the weights that sample may be behind those that train.

    `delay`: batch k is sampled with version max(0, k - delay_steps) and consumed at global step k, so every token has
    exactly this staleness. `bounded`: servers never wait; weights change while responses are in progress, and a group
    is consumed only while none of its tokens is older than `max_staleness`.
    """

    mode: Literal["delay", "bounded"] = Field(
        default="delay",
        description="Rule of staleness. delay: every token has the staleness delay_steps. bounded: servers sample "
        "continuously, and no token is staler than max_staleness.",
    )
    delay_steps: int = Field(
        default=2, ge=0, description="With mode = delay: staleness of every token in global steps."
    )
    max_staleness: int = Field(
        default=2, ge=1, description="With mode = bounded: maximum staleness of a token in global steps."
    )
    behavior_log_probs: Literal["trainer", "rollout"] = Field(
        default="trainer",
        description="Source of the behavior log-probs. trainer: the trainer computes them with the weights that "
        "sampled the token. rollout: those of the servers, which saves the scoring pass but puts the engine mismatch "
        "into every ratio; prefix minima are very sensitive to it.",
    )


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
    placement: Literal["disaggregated"] = Field(
        default="disaggregated",
        description="Placement of the servers. disaggregated, the only choice: they use other GPUs than the trainer.",
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
        "continues without it until the oldest of them is outside the window, and ends if no other server is left.",
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

    @field_validator("placement", mode="before")
    @classmethod
    def _not_colocated(cls, value: Any) -> Any:
        if value == "colocated":
            raise ValueError(
                "trainer and servers on the same GPUs are not supported: they work at the same time, and neither "
                "releases its memory for the other; set disaggregated and divide the GPUs between parallel and server, "
                "as recipes.qwen3_30b_a3b:minpro_one_machine does with eight"
            )
        return value


class CollectorConfig(Section):
    """The collector: its HTTP interface, which only the trainer's rank 0 uses, the rewards and the journal."""

    host: str = Field(
        default="127.0.0.1",
        description="Address on which the collector listens. The default, loopback, is not reachable from other "
        "machines.",
    )
    port: int = Field(default=0, ge=0, le=65535, description="Port of the collector; 0 selects a free port.")
    reward: str = Field(
        default="calculator",
        description="Grader of the responses: calculator, dapo, dapo_boxed, math, or your own function as "
        "package.module:function.",
    )
    reward_by_source: dict[str, str] = Field(
        default={},
        description="Other graders for the prompts of some sources, by the source that the prompt files state.",
    )
    right_reward: float = Field(
        default=RIGHT_REWARD,
        description="A response with at least this reward counts as correct, in the training accuracy and in every "
        "evaluation. The graders named under reward give 1 for a correct response.",
    )
    reward_timeout_s: float = Field(
        default=5.0,
        gt=0,
        description="Limit in seconds of processor time for grading one response; the limit of wall time is ten times "
        "as long. If a response cannot be graded in two attempts, its group is excluded from training.",
    )
    reward_workers: int = Field(default=1, ge=1, description="Number of processes that grade responses.")
    journal_ratios: bool = Field(
        default=True,
        description="Also store the log-prob of each token under the policy at the update, which takes 4 bytes per "
        "token.",
    )
    journal_keep_steps: int = Field(
        default=50,
        ge=0,
        description="Number of latest global steps whose tokens and log-probs stay in the journal; 0 keeps all.",
    )
    journal_keep_routes: bool = Field(
        default=False,
        description="With model.routing_replay = rollout: keep the servers' routes as long as the tokens, to train on "
        "the journal again (debug.journal) or to resume from an earlier checkpoint than the latest. false: they are "
        "removed when a checkpoint includes the step that consumed them.",
    )


class BenchmarkConfig(Section):
    """A file of prompts that is evaluated in addition to the held-out prompts."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name in metrics: evaluation/.../<name>.")
    file: str = Field(description="JSON Lines file in the format of data.heldout_file.")
    samples_per_prompt: int = Field(default=2, ge=1, description="Number of responses per prompt.")
    num_prompts: int | None = Field(
        default=None, ge=1, description="Number of prompts, from the beginning of the file; null uses all."
    )


class EvaluationConfig(Section):
    """pass@1 on held-out prompts and benchmarks at the first and the last policy version (and every `every_steps`).

    Weights are not replaced during an evaluation: with many samples the trainer waits. Samples are requested in groups
    of batch.responses_per_prompt, after the training groups. An evaluation that fails raises an alarm and has no score.
    """

    num_prompts: int = Field(
        default=128, ge=1, description="Number of held-out prompts, from the beginning of data.heldout_file."
    )
    samples_per_prompt: int = Field(default=8, ge=1, description="Number of responses per held-out prompt.")
    every_steps: int = Field(
        default=0,
        ge=0,
        description="Also evaluate every policy version that is a multiple of this; 0 evaluates only the first and the "
        "last one.",
    )
    temperature: float = Field(default=1.0, gt=0, description="Sampling temperature of evaluations.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Top-p of the sampling of evaluations; 1 means no limit.")
    benchmarks: list[BenchmarkConfig] = Field(
        default=[],
        description='Further files of prompts to evaluate, such as [{"name": "aime24", "file": "data/aime24.jsonl", '
        '"samples_per_prompt": 8}].',
    )

    @model_validator(mode="after")
    def _names_differ(self) -> "EvaluationConfig":
        names = [benchmark.name for benchmark in self.benchmarks]
        if len(set(names)) < len(names):
            raise ValueError(f"benchmarks: the names {names} must differ")
        return self
