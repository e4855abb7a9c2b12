"""Where prompts come from, how responses are sampled, which servers do it and how stale they may be."""

from typing import Literal

from pydantic import Field

from minpro_megatron.config.base import Section


class DataConfig(Section):
    """JSON Lines of `{"id", "source", "prompt", "answer"}`."""

    train_file: str
    heldout_file: str


class SamplingConfig(Section):
    """How training responses are sampled. There is no top-p or top-k on purpose: the trainer's log-probs are of
    the untruncated distribution, so truncated sampling would make every ratio wrong."""

    temperature: float = Field(default=1.0, gt=0)
    max_prompt_tokens: int = Field(default=2048, ge=1)
    max_response_tokens: int = Field(default=20480, ge=1)


class StalenessConfig(Section):
    """`delay`: batch k is sampled with policy version max(0, k - delay_steps) and consumed at global step k."""

    mode: Literal["delay"] = "delay"
    delay_steps: int = Field(default=2, ge=0)


class ServerConfig(Section):
    """The SGLang servers that the role `serve` starts on this machine."""

    count: int = Field(default=1, ge=1)
    host: str = Field(default="127.0.0.1", description="listening address; loopback unless told otherwise")
    first_port: int = Field(default=0, ge=0, le=65535, description="0: free ports are chosen")
    tensor_parallel: int = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cuda"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_total_tokens: int | None = Field(default=None, ge=1, description="KV cache size; None: SGLang decides")
    max_running_requests: int = Field(default=256, ge=1)
    start_timeout_s: float = Field(default=900, gt=0)
    request_timeout_s: float = Field(default=1800, gt=0)


class CollectorConfig(Section):
    """The collector's own HTTP interface, which only the trainer's rank 0 uses."""

    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535, description="0: a free port is chosen")
    reward: str = Field(default="calculator", description="name of a reward function in minpro_megatron/rewards")
    reward_timeout_s: float = Field(default=5.0, gt=0, description="hard limit for grading one response")
    reward_workers: int = Field(default=1, ge=1)


class EvaluationConfig(Section):
    """pass@1 on held-out prompts, sampled at the first and the last policy version (and every `every_steps`)."""

    num_prompts: int = Field(default=128, ge=1)
    samples_per_prompt: int = Field(default=8, ge=1)
    every_steps: int = Field(default=0, ge=0, description="also at each multiple of this policy version; 0: never")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
