"""How a rollout server is started: its engine's command line and its environment."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.serving.api_key import api_key
from minpro_megatron.serving.sglang_main import API_KEY_VARIABLE

# SGLang's scheduler silently shortens a response that would end at the context length or the KV pool's
# size, at most this many tokens before it: without the margin the longest responses would be cut below
# max_response_tokens.
CONTEXT_MARGIN_TOKENS = 8


def context_length(config: RunConfig) -> int:
    """The tokens a sequence may have on the server: prompt, response and SGLang's own margin.

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
    """The command line of server `index`, listening on `port`, for the engine that the run has chosen. `place`: which
    one of its machine's servers it is."""
    return ENGINE_COMMANDS[config.server.engine](config, index, port, place)


def sglang_command(config: RunConfig, index: int, port: int, place: int) -> list[str]:
    """SGLang's command line; the API key is not in it, `server_environment` hands it over."""
    server = config.server
    length = context_length(config)
    arguments = {
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
        # One line a request would be most of the log.
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
        # SGLang would give most of the machine's memory to the cache; half a minute goes by until it is
        # allocated.
        cache = cache or max(length, min(server.max_running_requests * length, 65536))
    else:
        arguments |= {"base-gpu-id": place * server.tensor_parallel}
    if cache is not None:
        arguments |= {"max-total-tokens": cache}
    command = [sys.executable, "-m", "minpro_megatron.serving.sglang_main"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    if config.model.routing_replay == "rollout":
        command.append("--enable-return-routed-experts")
    if needs_synchronous_scheduling(config):
        command.append("--disable-overlap-schedule")
    # Tokens in, tokens out: the tokenizer stays in collect. An idle scheduler would otherwise spin on a
    # whole core.
    return [*command, "--skip-tokenizer-init", "--skip-server-warmup", "--sleep-on-idle"]


def needs_synchronous_scheduling(config: RunConfig) -> bool:
    """Whether weights change between two tokens of a response while its KV cache stays.

    With overlap scheduling a token is then on its way that the old weights have sampled and that SGLang 0.5.23 counts
    as the new version's (Scheduler.pause_generation and record_weight_version_change). The answer does not show where:
    only requests of the last batch have such a token, and the first token of a response does not begin a new span.
    """
    return config.staleness.mode == "bounded" and config.publish.pause_mode == "in_place"


def reference_command(config: RunConfig, index: int, port: int, place: int) -> list[str]:
    """The reference engine's command line; it has no GPU, wherever it is. Raises ValueError for settings that it does
    not have."""
    server = config.server
    for field, supported in (("device", "cpu"), ("dtype", "float32"), ("tensor_parallel", 1)):
        if (value := getattr(server, field)) != supported:
            raise UserError(
                f"server.{field} = {value!r} with server.engine = 'reference': it has {supported!r} only; "
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


# Each engine's command line, from (settings, index, port, place).
ENGINE_COMMANDS: dict[str, Callable[[RunConfig, int, int, int], list[str]]] = {
    "sglang": sglang_command,
    "reference": reference_command,
}


def server_environment(config: RunConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a server process, from that of this process. Raises ValueError for a missing API key."""
    # A server talks to itself over HTTP when it starts, which a proxy setting must not redirect.
    not_proxied = ",".join(filter(None, [environment.get("NO_PROXY"), config.server.host, "127.0.0.1", "localhost"]))
    changes = {
        # With SGLang's 5 s a connection often closes while the trainer trains, under the next request's feet.
        "SGLANG_TIMEOUT_KEEP_ALIVE": "600",
        # /health then only tells whether the server is up; generating is proved once, after the start.
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
        # gloo would look its address up by the machine's name, which need not resolve.
        loopback = "lo" if sys.platform.startswith("linux") else "lo0"
        changes |= {"GLOO_SOCKET_IFNAME": environment.get("GLOO_SOCKET_IFNAME", loopback)}
    else:
        # When a member of the trainer's update group dies, torch would by default end the processes of all others. The
        # trainer looks after them (publishing/delivery.py). SGLang's own watchdog ends a server whose forward hangs.
        changes |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    if (key := api_key(config, environment)) is not None:
        changes |= {API_KEY_VARIABLE: key}
    return dict(environment) | changes
