"""The command line and the environment of a rollout server's process."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import JsonValue

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.serving.api_key import api_key
from minpro_megatron.serving.sglang_main import API_KEY_VARIABLE

# SGLang's scheduler silently shortens a response that would end at the context length or at the size of the KV
# pool, by at most this number of tokens: without the margin the longest responses would be shorter than
# max_response_tokens.
CONTEXT_MARGIN_TOKENS = 8
# Settings of torch's allocator for GPUs: the name since torch 2.9, and the older one.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def context_length(config: RunConfig) -> int:
    """The maximum tokens of a sequence on the server: prompt, response and SGLang's own margin.

    Raises ValueError if the model or the KV cache cannot hold the longest allowed sequence.
    """
    sampling = config.sampling
    length = sampling.max_prompt_tokens + sampling.max_response_tokens + CONTEXT_MARGIN_TOKENS
    longest = read_model_facts(config.model.hf_path).max_position_embeddings
    needed = f"sampling.max_prompt_tokens + sampling.max_response_tokens + {CONTEXT_MARGIN_TOKENS} = {length}"
    if length > longest:
        raise UserError(f"{needed} exceeds the model's max_position_embeddings = {longest}; lower one of them")
    cache = config.server.max_total_tokens
    if cache is not None and cache < length:
        raise UserError(f"{needed} exceeds server.max_total_tokens = {cache}; raise it")
    return length


def server_command(config: RunConfig, index: int, port: int, place: int) -> list[str]:
    """The command line of server `index`, listening on `port`, for the engine of the run. `place` is its number among
    the servers of its machine."""
    return ENGINE_COMMANDS[config.server.engine](config, index, port, place)


def sglang_command(config: RunConfig, index: int, port: int, place: int) -> list[str]:
    """SGLang's command line. It does not contain the API key, which `server_environment` passes."""
    command = [sys.executable, "-m", "minpro_megatron.serving.sglang_main"]
    for name, value in _sglang_arguments(config, index, port, place).items():
        command += option(name, value)
    return command


def _sglang_arguments(config: RunConfig, index: int, port: int, place: int) -> dict[str, JsonValue]:
    """By the names of SGLang's options, without their dashes."""
    server = config.server
    length = context_length(config)
    arguments: dict[str, JsonValue] = {
        "model-path": config.model.hf_path,
        "host": server.host,
        "port": port,
        "device": server.device,
        "dtype": server.dtype,
        "tp-size": server.tensor_parallel,
        "context-length": length,
        "max-running-requests": server.max_running_requests,
        "random-seed": derive_seed(config.seed, "server", index),
        # The version of the weights that the checkpoint holds; the trainer publishes 1, 2, ...
        "weight-version": 0,
        # One line per request would be most of the log.
        "log-level-http": "warning",
        "decode-log-interval": 1000,
    }
    cache = server.max_total_tokens
    if server.device == "cpu":
        arguments |= {
            "attention-backend": "torch_native",
            "sampling-backend": "pytorch",
            "chunked-prefill-size": 4096,
        }
        # By default SGLang would give most of the machine's memory to the cache, and allocating it takes half a
        # minute.
        cache = cache or max(length, min(server.max_running_requests * length, 65536))
    else:
        arguments |= {"base-gpu-id": place * server.tensor_parallel}
        # SGLang would round logits to the dtype of the weights; the trainer multiplies into float32 too
        arguments |= {"enable-fp32-lm-head": True}
    if cache is not None:
        arguments |= {"max-total-tokens": cache}
    if server.memory_fraction is not None:
        arguments |= {"mem-fraction-static": server.memory_fraction}
    if server.expert_parallel > 1:
        arguments |= {"ep-size": server.expert_parallel}
    if config.model.routing_replay == "rollout":
        arguments |= {"enable-return-routed-experts": True}
    if server.takes_turns and server.device == "cuda":  # on the CPU SGLang only pretends to release memory
        arguments |= {"enable-memory-saver": True}
    if needs_synchronous_scheduling(config):
        arguments |= {"disable-overlap-schedule": True}
    # Tokens in, tokens out: the tokenizer stays in collect. An idle scheduler would otherwise keep a core
    # busy.
    arguments |= {"skip-tokenizer-init": True, "skip-server-warmup": True, "sleep-on-idle": True}
    return arguments | {name.replace("_", "-"): value for name, value in server.arguments.items()}


def option(name: str, value: JsonValue) -> list[str]:
    """One option of SGLang's command line, with its value in the form that SGLang's parser expects.

    >>> option("gc-threshold", [10, 5]), option("sleep-on-idle", True), option("sleep-on-idle", None)
    (['--gc-threshold', '10', '5'], ['--sleep-on-idle'], [])
    """
    match value:
        case None:
            return []
        case True:
            return [f"--{name}"]
        case False:
            return [f"--no-{name}"]
        case list():
            return [f"--{name}", *map(_as_text, value)]
        case _:
            text = _as_text(value)
            # in one part, a value that begins with "-" is not mistaken for an option
            return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def _as_text(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def needs_synchronous_scheduling(config: RunConfig) -> bool:
    """Whether weights can change between two tokens of a response while its KV cache is kept.

    With overlap scheduling a token is then in flight that the old weights have sampled and that SGLang 0.5.23 assigns
    to the new version (Scheduler.pause_generation and record_weight_version_change). The answer does not show where:
    only requests of the last batch have such a token, and the first token of a response does not start a new span.
    """
    return config.staleness.mode == "bounded" and config.publish.pause_mode == "in_place"


def reference_command(config: RunConfig, index: int, port: int, place: int) -> list[str]:
    """The reference engine's command line; it runs on the CPU on every machine. Raises ValueError for settings that it
    does not support."""
    server = config.server
    for field, supported in (("device", "cpu"), ("dtype", "float32"), ("tensor_parallel", 1)):
        if (value := getattr(server, field)) != supported:
            raise UserError(
                f"server.{field} = {value!r} with server.engine = 'reference': it supports {supported!r} only; "
                "set that, or server.engine = 'sglang'"
            )
    arguments = {
        "model-path": config.model.hf_path,
        "host": server.host,
        "port": port,
        "context-length": context_length(config),
        "max-running-requests": server.max_running_requests,
        "weight-version": 0,
    }
    command = [sys.executable, "-m", "minpro_megatron.reference_engine"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    return command


# The functions that return each engine's command line, from (settings, index, port, place).
ENGINE_COMMANDS: dict[str, Callable[[RunConfig, int, int, int], list[str]]] = {
    "sglang": sglang_command,
    "reference": reference_command,
}


def server_environment(config: RunConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server process, based on that of this process. Raises UserError for a missing API key."""
    # At its start a server sends itself HTTP requests, which a proxy setting must not redirect.
    not_proxied = ",".join(filter(None, [environment.get("NO_PROXY"), config.server.host, "127.0.0.1", "localhost"]))
    changes = {
        # With SGLang's 5 s a connection often closes while the trainer trains, just before the next request.
        "SGLANG_TIMEOUT_KEEP_ALIVE": "600",
        # /health then only shows whether the server is up; generation is checked once, after the start.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        "NO_PROXY": not_proxied,
        "no_proxy": not_proxied,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if Path(config.model.hf_path).is_dir():
        changes |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if config.server.device == "cpu":
        changes |= {"SGLANG_USE_CPU_ENGINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        # gloo would look up its address by the machine's name, which may not resolve.
        loopback = "lo" if sys.platform.startswith("linux") else "lo0"
        changes |= {"GLOO_SOCKET_IFNAME": environment.get("GLOO_SOCKET_IFNAME", loopback)}
    else:
        # When a member of the trainer's update group dies, torch by default ends the processes of all other members.
        # The trainer handles this itself (publishing/delivery.py). SGLang's watchdog ends a server whose forward hangs.
        changes |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    if (key := api_key(config, environment)) is not None:
        changes |= {API_KEY_VARIABLE: key}
    if config.server.takes_turns and config.server.device == "cuda":
        changes |= _without_expandable_segments(environment)
    return dict(environment) | changes


def _without_expandable_segments(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of torch's allocator without this choice of the user: torch_memory_saver 0.0.10, with which SGLang
    releases memory, does not see such segments, and refuses to start if it finds them in the older variable."""
    chosen = {name: environment[name] for name in ALLOCATOR_VARIABLES if name in environment}
    return {
        name: ",".join(part for part in text.split(",") if part.partition(":")[0].strip() != "expandable_segments")
        for name, text in chosen.items()
    }
