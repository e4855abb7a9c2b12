"""Torch's attention in packed rows, causal and with the masks of context ranks, against plain sums in float32."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minpro_megatron.actor.backends.torch_backend import PaddedLayout, packed_attention, padded_layout
from minpro_megatron.batching.shards import context_shard
from minpro_megatron.gpu_checks.meter import Meter, relative_error
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged

Attention = Callable[[Tensor, Tensor, PaddedLayout, float | None], Tensor]


@dataclass(frozen=True)
class Shapes:
    """`lengths`: padded lengths of the sequences in the row, multiples of 2 x context ranks."""

    lengths: tuple[int, ...]
    heads: int
    groups: int
    head_dim: int
    dtype: str
    rounds: int


# bfloat16 rounds the result to 2^-8 of it. The largest row here would need 4.8 GB for one matrix of scores: an
# attention that makes one exceeds the limit of bytes, which the plan does not count.
FULL = (
    Shapes(lengths=(6144, 4096, 4096, 2048), heads=32, groups=4, head_dim=128, dtype="bfloat16", rounds=5),
    (
        Limit("causal_error", at_most=0.02),
        Limit("causal_gradient_error", at_most=0.02),
        Limit("context_error", at_most=0.02),
        Limit("context_gradient_error", at_most=0.02),
        Limit("causal_peak_over_operands", at_most=6),
        Limit("context_peak_over_operands", at_most=6),
    ),
)
SMALL = (
    Shapes(lengths=(24, 16, 8), heads=4, groups=2, head_dim=16, dtype="float32", rounds=1),
    tuple(Limit(limit.name, at_most=1e-4) for limit in FULL[1] if limit.name.endswith("error")),
)


def check(
    device: torch.device,
    shapes: Shapes,
    limits: tuple[Limit, ...],
    attention: Attention = packed_attention,
    meter: Meter | None = None,
) -> Outcome:
    """`causal`: one rank that has the whole row. `context`: each of two context ranks in turn, with the keys and values
    of both, which need a mask. Errors are relative to the largest entry; a peak is that of forward and backward above
    the operands, over the bytes of the operands as they are padded."""
    meter = meter or Meter(device)
    torch.manual_seed(0)
    tokens, dtype = sum(shapes.lengths), getattr(torch, shapes.dtype)
    query = torch.randn(tokens, shapes.heads, shapes.head_dim, device=device).to(dtype)
    key_value = torch.randn(tokens, 2, shapes.groups, shapes.head_dim, device=device).to(dtype)
    upstream = torch.randn(tokens, shapes.heads * shapes.head_dim, device=device).to(dtype)
    expected = _with_gradients(lambda q, kv: _plain(q, kv, shapes.lengths), query.float(), key_value.float(), upstream)
    figures: dict[str, Figure] = {}
    for name, context_size in (("causal", 1), ("context", 2)):
        held = [torch.from_numpy(context_shard(list(shapes.lengths), context_size, rank)).to(device)
                for rank in range(context_size)]  # fmt: skip
        order = torch.cat(held)  # of the keys and values gathered from the ranks
        out, d_query = torch.empty_like(expected[0]), torch.empty_like(expected[1])
        d_key_value = torch.zeros_like(expected[2])
        for rank, mine in enumerate(held):
            layout = padded_layout(list(shapes.lengths), context_size, rank, device)
            operands = (query[mine], key_value[order], upstream[mine])
            found = _with_gradients(lambda q, kv, layout=layout: attention(q, kv, layout, None), *operands)
            out[mine], d_query[mine] = found[0].float(), found[1].float()
            d_key_value[order] += found[2].float()
        figures[f"{name}_error"] = relative_error(out, expected[0])
        figures[f"{name}_gradient_error"] = max(
            relative_error(d_query, expected[1]), relative_error(d_key_value, expected[2])
        )

        def work(layout: PaddedLayout = layout, operands: tuple[Tensor, ...] = operands) -> None:
            _with_gradients(lambda q, kv: attention(q, kv, layout, None), *operands)

        peak = meter.peak_bytes(work)
        padded = layout.query_index_NQ.numel() * shapes.heads + 2 * layout.key_index_NK.numel() * shapes.groups
        figures[f"{name}_peak_bytes"] = peak
        figures[f"{name}_peak_over_operands"] = (
            None if peak is None else peak / (padded * shapes.head_dim * dtype.itemsize)
        )
        figures[f"{name}_both_ms"] = meter.median_seconds(work, shapes.rounds) * 1e3
    return judged(figures, limits)


def _with_gradients(
    attention: Callable[[Tensor, Tensor], Tensor], query: Tensor, key_value: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, d query, d key and value)."""
    query, key_value = query.detach().requires_grad_(), key_value.detach().requires_grad_()
    out = attention(query, key_value)
    d_query, d_key_value = torch.autograd.grad(out, (query, key_value), upstream.to(out.dtype))
    return out.detach(), d_query, d_key_value


def _plain(query: Tensor, key_value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Causal attention of each sequence and head group by its formula, [T, H * D]."""
    parts = []
    groups, start = key_value.shape[2], 0
    per_group = query.shape[1] // groups
    for length in lengths:
        part = slice(start, start + length)
        start += length
        future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        heads = []
        for head in range(query.shape[1]):
            key, value = key_value[part, :, head // per_group].unbind(1)
            scores = query[part, head] @ key.t() * query.shape[-1] ** -0.5
            heads.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value)
        parts.append(torch.stack(heads, 1).flatten(1))
    return torch.cat(parts)
