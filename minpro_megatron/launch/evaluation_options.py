"""The options of the command `eval`: validated and converted to settings of servers, sampling and grading."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from minpro_megatron.config.reward import RIGHT_REWARD
from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.errors import UserError
from minpro_megatron.evaluation.benchmarks import BENCHMARKS, samples_of
from minpro_megatron.launch.preflight.run_checks import count_gpus
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.prompts import TokenizedPrompt, load_prompts, make_rendering, tokenize
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt
from minpro_megatron.roles.evaluate import SAMPLES_PER_REQUEST

SERVERS_FOLDER = "servers"


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options by their names on the command line; options that are not given are None or empty."""

    model: str
    benchmarks: Sequence[str]
    output: Path
    data: Path = Path("data")
    benchmark_files: Mapping[str, Path] = field(default_factory=dict)
    samples: Mapping[str, int] = field(default_factory=dict)  # by benchmark; "" for all others
    num_prompts: int | None = None
    temperature: float = 1.0
    top_p: float = 0.7
    max_response_tokens: int = 20480
    max_prompt_tokens: int = 2048
    instruction: str = "dapo"
    chat_template: bool = False
    chat_template_arguments: Mapping[str, Any] = field(default_factory=dict)
    extra_stop_tokens: Sequence[str] = ()
    reward: str = "math"
    right_reward: float = RIGHT_REWARD
    reward_workers: int = 1
    reward_timeout_s: float = 5.0
    seed: int = 0
    urls: Sequence[str] = ()
    api_key_variable: str = ""
    engine: str = "sglang"
    device: str | None = None
    dtype: str | None = None
    servers: int = 1
    tensor_parallel: int = 1
    max_running_requests: int = 256
    start_timeout_s: float = 900.0
    request_timeout_s: float = 7200.0
    compare: Sequence[Path] = ()


def run_config(options: EvaluationOptions) -> RunConfig:
    """The settings of serve, clients and graders; their run folder is OUTPUT/servers. Raises UserError."""
    device = options.device or ("cuda" if options.engine == "sglang" and count_gpus() else "cpu")
    server: dict[str, Any] = {
        "engine": options.engine,
        "urls": list(options.urls),
        "api_key_variable": options.api_key_variable,
        "count": options.servers,
        "tensor_parallel": options.tensor_parallel,
        "device": device,
        "dtype": options.dtype or ("bfloat16" if device == "cuda" else "float32"),
        "max_running_requests": options.max_running_requests,
        "start_timeout_s": options.start_timeout_s,
        "request_timeout_s": options.request_timeout_s,
    }
    values = {
        "name": SERVERS_FOLDER,
        "runs_dir": str(options.output),
        "seed": options.seed,
        # there is no trainer, so settings that only the trainer reads have no effect
        "device": "cpu",
        "model": {"hf_path": options.model, "megatron_path": "", "dtype": "float32"},
        "data": {
            "train_file": "",
            "heldout_file": "",
            "instruction": options.instruction,
            "chat_template": options.chat_template,
            "chat_template_arguments": dict(options.chat_template_arguments),
        },
        "batch": {
            "responses_per_prompt": SAMPLES_PER_REQUEST,
            "max_tokens_per_row": options.max_prompt_tokens + options.max_response_tokens,
        },
        "sampling": {
            "max_prompt_tokens": options.max_prompt_tokens,
            "max_response_tokens": options.max_response_tokens,
            "extra_stop_tokens": list(options.extra_stop_tokens),
        },
        "server": server,
        "reward": {
            "function": options.reward,
            "right_reward": options.right_reward,
            "by_source": {"calculator": "calculator"},
            "workers": options.reward_workers,
            "timeout_s": options.reward_timeout_s,
        },
        "evaluation": {"temperature": options.temperature, "top_p": options.top_p},
    }
    return parse_run_config(values)


def samples_per_prompt(options: EvaluationOptions) -> dict[str, int]:
    """The samples per prompt of each benchmark: its own number, else the number given for all, else the paper's."""
    if unknown := options.samples.keys() - {*options.benchmarks, ""}:
        raise UserError(f"--samples {sorted(unknown)[0]}=...: it is not among --benchmarks")
    rest = options.samples.get("")
    return {name: options.samples.get(name, rest or samples_of(name)) for name in options.benchmarks}


def read_benchmarks(options: EvaluationOptions, config: RunConfig) -> dict[str, list[TokenizedPrompt]]:
    """The prompts of each benchmark as tokens. Raises UserError with one line per problem."""
    try:
        tokenizer = TextTokenizer(options.model, read_model_facts(options.model, options.extra_stop_tokens))
        rendering = make_rendering(config.data, options.model)
    except OSError as error:
        raise UserError(str(error)) from None
    found, problems = {}, []
    for name in options.benchmarks:
        try:
            prompts = _load(options, name)
            found[name] = tokenize(prompts, tokenizer, options.max_prompt_tokens, name, rendering)
            if dropped := {prompt.id for prompt in prompts} - {kept.prompt.id for kept in found[name]}:
                raise UserError(
                    f"{name}: {len(dropped)} prompts, such as {min(dropped)!r}, are longer than --max-prompt-tokens = "
                    f"{options.max_prompt_tokens}, or empty; raise it, because a benchmark without these prompts is "
                    "not comparable"
                )
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return found


def benchmark_file(options: EvaluationOptions, name: str) -> Path:
    return Path(options.benchmark_files.get(name, options.data / f"{name}.jsonl"))


def _load(options: EvaluationOptions, name: str) -> list[Prompt]:
    path = benchmark_file(options, name)
    if not path.is_file():
        made = f"make it with `minpro prepare {name}` (see its --help), or " if name in BENCHMARKS else ""
        raise UserError(f"--benchmarks {name}: {path}: no such file; {made}give --benchmark-file {name}=PATH")
    prompts = load_prompts(path, f"--benchmarks {name}")
    if options.num_prompts is not None and options.num_prompts > len(prompts):
        raise UserError(f"--num-prompts {options.num_prompts}: {path} has only {len(prompts)} rows; lower it")
    return prompts[: options.num_prompts]


def sampling_settings(
    options: EvaluationOptions, config: RunConfig, prompts: Mapping[str, Sequence[TokenizedPrompt]]
) -> dict[str, Any]:
    """The settings that determine the samples: an evaluation resumes only with the same ones. The number of servers and
    the distribution of work over them are not included."""
    samples, server = samples_per_prompt(options), config.server
    return {
        "model": str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model,
        "model_files": _model_fingerprint(Path(options.model)),
        "benchmarks": {
            name: {
                "samples_per_prompt": samples[name],
                "num_prompts": len(tokenized),
                "prompts_digest": _prompts_digest(tokenized),
            }
            for name, tokenized in prompts.items()
        },
        "temperature": options.temperature,
        "top_p": options.top_p,
        "max_response_tokens": options.max_response_tokens,
        "instruction": options.instruction,
        "chat_template": options.chat_template,
        "chat_template_arguments": dict(options.chat_template_arguments),
        "extra_stop_tokens": list(options.extra_stop_tokens),
        "reward": options.reward,
        "seed": options.seed,
        "servers": "of others (--urls)" if server.urls else f"{server.engine}, {server.dtype}",
    }


def _model_fingerprint(folder: Path) -> str:
    """A digest that changes when a file of the checkpoint is replaced; for weights it covers only sizes and times."""
    digest = blake2b(digest_size=8)
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _prompts_digest(tokenized: Sequence[TokenizedPrompt]) -> str:
    digest = blake2b(digest_size=8)
    for prompt in tokenized:
        digest.update(repr((prompt.prompt.id, prompt.prompt.source, prompt.prompt.answer)).encode())
        digest.update(prompt.token_ids.tobytes())
    return digest.hexdigest()
