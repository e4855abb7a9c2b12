"""The share of a GPU's memory that SGLang gives to weights and KV cache when server.memory_fraction is not set.

Source: handle_gpu_memory_settings of SGLang 0.5.23 (sglang/srt/arg_groups/memory_hook.py). The rest is for activations
and CUDA graphs; SGLang estimates it from the size of a prefill chunk and the largest batch of its graphs.
"""

from typing import NamedTuple

from minpro_megatron.config.server import ServerConfig

MIB = 2**20


class _Defaults(NamedTuple):
    """SGLang's choices for GPUs below this size."""

    below_mib: float
    prefill_tokens: int  # in a chunk
    graph_batch: int  # largest batch of a CUDA graph; of few and of many tensor-parallel ranks
    graph_batch_of_many: int


_MANY_RANKS = 4
_DEFAULTS = (
    _Defaults(20 * 1024, 2048, 8, 8),
    _Defaults(35 * 1024, 4096, 48, 160),
    _Defaults(60 * 1024, 4096, 32, 160),
    _Defaults(160 * 1024, 8192, 256, 512),
    _Defaults(float("inf"), 16384, 512, 512),
)
_FIXED_MIB, _MIB_PER_TOKEN, _MIB_PER_RANK, _MIB_PER_REQUEST, _MIB_PER_PREFILL_GRAPH = 512, 1.5, 128, 2, 8
_LARGE_MIB, _LARGE_RESERVE_MIB = 60 * 1024, 10 * 1024  # a larger GPU reserves at least so much


def static_share(server: ServerConfig, memory_bytes: int) -> float:
    """The share for weights and KV cache of a GPU of this size, to three digits."""
    memory_mib = memory_bytes / MIB
    defaults = next(one for one in _DEFAULTS if memory_mib < one.below_mib)
    chunk = server.arguments.get("chunked_prefill_size")
    tokens = chunk if isinstance(chunk, int) and chunk > 0 else defaults.prefill_tokens
    ranks = server.tensor_parallel
    batch = defaults.graph_batch if ranks < _MANY_RANKS else defaults.graph_batch_of_many
    if server.max_running_requests:
        batch = min(batch, server.max_running_requests)
    reserved = _FIXED_MIB + max(tokens, 2048) * _MIB_PER_TOKEN + ranks * _MIB_PER_RANK
    reserved += batch * _MIB_PER_REQUEST + prefill_graphs(tokens) * _MIB_PER_PREFILL_GRAPH
    if memory_mib > _LARGE_MIB:
        reserved = max(reserved, _LARGE_RESERVE_MIB)
    return round((memory_mib - reserved) / memory_mib, 3)


def prefill_graphs(tokens: int) -> int:
    """The number of CUDA graphs for prefills of up to `tokens` tokens; short ones are closer together."""
    sizes = [(4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256), (4608, tokens + 1, 512)]
    return sum(size <= tokens for begin, end, step in sizes for size in range(begin, end, step))
