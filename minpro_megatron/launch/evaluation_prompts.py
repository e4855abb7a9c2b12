"""The prompts of an evaluation as tokens, and what determines its samples."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.evaluation.benchmarks import BENCHMARKS
from minpro_megatron.launch.evaluation_options import EvaluationOptions, samples_per_prompt
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.prompts import TokenizedPrompt, load_prompts, tokenize
from minpro_megatron.prompts.rendering import make_rendering
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Prompt


def read_benchmarks(options: EvaluationOptions, config: RunConfig) -> dict[str, list[TokenizedPrompt]]:
    """The prompts of each benchmark as tokens. Raises UserError with one line per problem."""
    try:
        tokenizer = TextTokenizer(options.model, read_model_facts(options.model, config.sampling.extra_stop_tokens))
        rendering = make_rendering(config.data, options.model)
    except OSError as error:
        raise UserError(str(error)) from None
    found, problems = {}, []
    longest = config.sampling.max_prompt_tokens
    for name in options.benchmarks:
        try:
            prompts = _load(options, name)
            found[name] = tokenize(prompts, tokenizer, longest, name, rendering)
            if dropped := {prompt.id for prompt in prompts} - {kept.prompt.id for kept in found[name]}:
                raise UserError(
                    f"{name}: {len(dropped)} prompts, such as {min(dropped)!r}, are longer than --max-prompt-tokens = "
                    f"{longest}, or empty; raise it, because a benchmark without these prompts is "
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
    options: EvaluationOptions,
    config: RunConfig,
    prompts: Mapping[str, Sequence[TokenizedPrompt]],
    *,
    is_number_fixed: bool = True,
) -> dict[str, Any]:
    """The settings that determine the samples: an evaluation resumes only with the same ones. The number of servers and
    the distribution of work over them are not included, nor is the number of samples unless it is fixed."""
    samples, server = samples_per_prompt(options), config.server
    episodes = {"environment": config.environment.model_dump(), "max_turns": config.sampling.max_turns}
    return {
        "model": str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model,
        "model_files": _model_fingerprint(Path(options.model)),
        "benchmarks": {
            name: {
                **({"samples_per_prompt": samples[name]} if is_number_fixed else {}),
                "num_prompts": len(tokenized),
                "prompts_digest": _prompts_digest(tokenized),
            }
            for name, tokenized in prompts.items()
        },
        "temperature": config.evaluation.temperature,
        "top_p": config.evaluation.top_p,
        "max_response_tokens": config.sampling.max_response_tokens,
        "instruction": config.data.instruction,
        "chat_template": config.data.chat_template,
        "chat_template_arguments": dict(config.data.chat_template_arguments),
        "extra_stop_tokens": list(config.sampling.extra_stop_tokens),
        "reward": config.reward.function,
        "seed": config.seed,
        "servers": "of others (--urls)" if server.urls else f"{server.engine}, {server.dtype}",
        **(episodes if config.environment.enabled else {}),
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
