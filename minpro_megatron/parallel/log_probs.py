"""Log-probs of the labels from sequence-sharded hidden states, without materializing the row's logits.

Shapes: L tokens of this tensor rank's sequence piece, P tensor ranks, C gathered tokens of a chunk, V vocabulary
columns of this rank, B columns of a block, H hidden size.

A chunk of tokens is gathered over the tensor ranks. Its logits are computed in blocks of columns, and only a few
numbers per token are kept of each block. Ranks exchange those once per chunk. Backward recomputes each block's logits.
Blocks in both directions keep memory traffic small: a block of logits is read from where it was just written, and the
gradients of the weight are accessed once per chunk, those of the hidden states once per block.

With support replay a token's softmax is restricted to the columns that truncated sampling kept: besides the sums over
all columns there are those over the kept ones, of the same logits.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.parallel.kept_columns import KeptColumns, KeptInChunk
from minpro_megatron.parallel.products import add_product, operand, product

# (gathered tokens, vocabulary columns) of a block of float32 logits. On a CPU 8 MiB, which fits in the cache; measured
# (benchmarks/log_probs.md). On a GPU 256 MiB: the traffic of the gradients' float32 accumulators, read and written once
# per block, is then a fifth of that of the logits; with 2,048 x 2,048 it would be equal. Calculated, not measured.
CPU_BLOCK = (1024, 2048)
CUDA_BLOCK = (8192, 8192)


def vocab_parallel_log_probs(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    label_ids_S: Tensor,
    *,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of the own tokens in nats, float32 [L]; the entropies carry no gradient.

    `label_ids_S` are the labels of all P x L tokens of the context shard, in tensor-rank order. Columns at and past
    `vocab_size` (padding) are outside the softmax and get no gradient. Logits are divided by `temperature`. Logits,
    softmax and the sums for both gradients are float32 for every input dtype. A token's result is NaN if one of its
    logits is NaN or infinite or its label is outside the vocabulary. Each rank gathers `chunk_tokens` of its tokens at
    a time. With one rank in `group` nothing is communicated.
    """
    settings = _settings(hidden_LH, weight_VH, vocab_size, temperature, group, chunk_tokens)
    labels_PL = label_ids_S.view(group.size(), -1)
    log_probs, entropies, _ = _VocabParallelLogProbs.apply(hidden_LH, weight_VH, labels_PL, settings, None)
    return log_probs, entropies


def kept_log_probs(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    label_ids_S: Tensor,
    kept: KeptColumns,
    *,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, entropies, kept masses) of the own tokens, float32 [L]; only the log-probs carry a gradient.

    The log-probs are those of the softmax over each token's `kept` columns; a token's results are NaN also if its label
    is not one of them. The mass is the probability of all kept columns together in the softmax over the vocabulary, and
    the entropies are of that softmax too. Everything else is as in `vocab_parallel_log_probs`.
    """
    settings = _settings(hidden_LH, weight_VH, vocab_size, temperature, group, chunk_tokens)
    return _VocabParallelLogProbs.apply(hidden_LH, weight_VH, label_ids_S.view(group.size(), -1), settings, kept)


def _settings(
    hidden_LH: Tensor,
    weight_VH: Tensor,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup,
    chunk_tokens: int | None,
) -> "_Settings":
    tokens, columns = CUDA_BLOCK if hidden_LH.is_cuda else CPU_BLOCK
    chunk = chunk_tokens or max(1, tokens // group.size())
    real_columns = max(0, min(weight_VH.shape[0], vocab_size - group.rank() * weight_VH.shape[0]))
    return _Settings(real_columns, temperature, group, chunk, columns)


class _Settings(NamedTuple):
    real_columns: int
    temperature: float
    group: dist.ProcessGroup
    chunk: int
    block_columns: int

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        return (slice(start, min(start + self.chunk, num_tokens)) for start in range(0, num_tokens, self.chunk))

    def blocks(self) -> Iterator[slice]:
        starts = range(0, self.real_columns, self.block_columns)
        return (slice(start, min(start + self.block_columns, self.real_columns)) for start in starts)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        labels_PL: Tensor,
        settings: _Settings,
        kept: KeptColumns | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        group = settings.group
        log_probs = hidden_LH.new_empty(hidden_LH.shape[0], dtype=torch.float32)
        entropies, masses = torch.empty_like(log_probs), torch.ones_like(log_probs)
        log_normalizer_PL = hidden_LH.new_empty(labels_PL.shape, dtype=torch.float32)
        for part in settings.chunks(hidden_LH.shape[0]):
            hidden_CH = _gather(hidden_LH[part].contiguous(), group)
            in_chunk = None if kept is None else kept.chunk(part, group.size())
            labels = _local_labels(labels_PL[:, part], weight_VH, group)
            sums = _sums_over_columns(hidden_CH, weight_VH, labels, settings, in_chunk)
            found = _over_ranks(sums, group, None if in_chunk is None else in_chunk.is_free_C)
            log_normalizer_PL[:, part] = found.log_normalizer.view(group.size(), -1)
            log_probs[part] = found.log_prob.view(group.size(), -1)[group.rank()]
            entropies[part] = found.entropy.view(group.size(), -1)[group.rank()]
            if found.kept_mass is not None:
                masses[part] = found.kept_mass.view(group.size(), -1)[group.rank()]
        ctx.save_for_backward(hidden_LH, weight_VH, labels_PL, log_normalizer_PL)
        ctx.settings, ctx.kept = settings, kept
        ctx.mark_non_differentiable(entropies, masses)
        return log_probs, entropies, masses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_LH, weight_VH, labels_PL, log_normalizer_PL = ctx.saved_tensors
        settings, kept, group = ctx.settings, ctx.kept, ctx.settings.group
        gradient_PL = _gather(gradients[0].contiguous(), group).view(labels_PL.shape)
        d_hidden = torch.empty_like(hidden_LH)
        d_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        for part in settings.chunks(hidden_LH.shape[0]):
            hidden_CH = operand(_gather(hidden_LH[part].contiguous(), group))
            in_chunk = None if kept is None else kept.chunk(part, group.size())
            labels = _local_labels(labels_PL[:, part], weight_VH, group)
            normalizer, gradient = log_normalizer_PL[:, part].reshape(-1), gradient_PL[:, part].reshape(-1)
            d_hidden_CH = torch.zeros_like(hidden_CH, dtype=torch.float32)
            for block in settings.blocks():
                weight_BH = operand(weight_VH[block])
                logits = product(hidden_CH, weight_BH.t(), 1 / settings.temperature)
                upstream = (normalizer, labels - block.start, gradient, hidden_CH.dtype)
                if in_chunk is None:
                    d_logits = _elementwise(_logit_gradient, logits.device.type)(logits, *upstream)
                else:
                    is_kept = in_chunk.mask(block)
                    d_logits = _elementwise(_kept_logit_gradient, logits.device.type)(logits, is_kept, *upstream)
                    del is_kept
                del logits
                add_product(d_weight[block], d_logits.t(), hidden_CH, 1 / settings.temperature)
                add_product(d_hidden_CH, d_logits, weight_BH, 1 / settings.temperature)
                del d_logits  # before the next block's are made
            d_hidden[part] = _reduce_scatter(d_hidden_CH, group)
        return d_hidden, d_weight.to(weight_VH.dtype), None, None, None


class _Sums(NamedTuple):
    """Sums for every gathered token over some of the vocabulary's columns; float32 [C] each. z are the logits."""

    largest: Tensor  # max z; -inf over no columns
    total: Tensor  # sum of exp(z - largest)
    weighted: Tensor  # sum of exp(z - largest) (z - largest)
    label: Tensor  # z of the label, 0 if it is not among the columns
    found: Tensor  # 1 if the label is among the columns, and kept; else 0
    kept_largest: Tensor  # as largest and total over the kept columns; -inf and 0 if there are none
    kept_total: Tensor


def _sums_over_columns(
    hidden_CH: Tensor, weight_VH: Tensor, labels: Tensor, settings: _Settings, kept: KeptInChunk | None
) -> _Sums:
    add_block = _elementwise(_add_block, hidden_CH.device.type)
    add_kept_block = _elementwise(_add_kept_block, hidden_CH.device.type)
    hidden_CH = operand(hidden_CH)
    zero = hidden_CH.new_zeros(len(hidden_CH), dtype=torch.float32)
    largest, total, weighted, label, found = torch.full_like(zero, -torch.inf), zero, zero, zero, zero
    kept_largest, kept_total = largest, zero
    for block in settings.blocks():
        logits = product(hidden_CH, operand(weight_VH[block]).t(), 1 / settings.temperature)
        column = labels - block.start
        inside = (column >= 0) & (column < logits.shape[1])
        column = torch.where(inside, column, 0)[:, None]
        label = torch.where(inside, logits.gather(1, column)[:, 0], label)
        if kept is not None:
            is_kept = kept.mask(block)
            inside = inside & is_kept.gather(1, column)[:, 0]
            kept_largest, kept_total = add_kept_block(logits, is_kept, kept_largest, kept_total)
            del is_kept
        found = found + inside
        largest, total, weighted = add_block(logits, largest, total, weighted)
        del logits  # before the next block's are made
    return _Sums(largest, total, weighted, label, found, kept_largest, kept_total)


class _OverRanks(NamedTuple):
    """The results of every gathered token, the same on all tensor ranks; float32 [C] each."""

    log_prob: Tensor  # of the label
    entropy: Tensor
    log_normalizer: Tensor  # the log-sum-exp of the columns that the token keeps
    kept_mass: Tensor | None  # None if every token keeps all columns


def _over_ranks(sums: _Sums, group: dist.ProcessGroup, is_free: Tensor | None) -> _OverRanks:
    """`is_free`, bool [C]: the token keeps every column; None: all tokens do."""
    largest, kept_largest = sums.largest.clone(), sums.kept_largest
    if group.size() > 1:
        # the maximum of gloo and NCCL may drop a NaN, but a rank that has a NaN also has it in its sums
        if is_free is None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        else:
            both = torch.stack([largest, kept_largest])
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=group)
            largest, kept_largest = both
    total, weighted = _relative_to(largest, sums.largest, sums.total, sums.weighted)
    parts = [total, weighted, sums.label, sums.found]
    if is_free is not None:
        parts.append(sums.kept_total * (sums.kept_largest - _finite(kept_largest)).exp())
    summed = torch.stack(parts)
    if group.size() > 1:
        dist.all_reduce(summed, group=group)
    total, weighted, label, found = summed[:4]
    log_total = total.log()
    # A logit of -inf adds only 0 to `total` but makes `weighted` NaN: propagate the NaN
    valid = torch.where((found > 0) & ~weighted.isnan(), 0.0, torch.nan)
    entropy, log_normalizer = log_total - weighted / total + valid, largest + log_total + valid
    if is_free is None:
        return _OverRanks(label - largest - log_total + valid, entropy, log_normalizer, None)
    largest, log_total = torch.where(is_free, largest, kept_largest), torch.where(is_free, log_total, summed[4].log())
    kept_normalizer = largest + log_total + valid
    kept_mass = (kept_normalizer - log_normalizer).exp()
    return _OverRanks(label - largest - log_total + valid, entropy, kept_normalizer, kept_mass)


# The next four functions process every logit. On a GPU each is compiled into one kernel; on a CPU they run eagerly.


def _add_block(logits_CB: Tensor, largest: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`largest`, `total` and `weighted` (see _Sums) over the previous columns and those of the block."""
    previous, largest = largest, torch.maximum(largest, logits_CB.amax(dim=1))
    total, weighted = _relative_to(largest, previous, total, weighted)
    shifted = logits_CB - largest[:, None]
    exponentials = shifted.exp()
    return largest, total + exponentials.sum(dim=1), weighted + (exponentials * shifted).sum(dim=1)


def _add_kept_block(logits_CB: Tensor, is_kept_CB: Tensor, largest: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """`kept_largest` and `kept_total` (see _Sums) over the previous columns and those of the block."""
    kept_CB = logits_CB.masked_fill(~is_kept_CB, -torch.inf)
    previous, largest = largest, torch.maximum(largest, kept_CB.amax(dim=1))
    reference = _finite(largest)
    return largest, total * (previous - reference).exp() + (kept_CB - reference[:, None]).exp().sum(dim=1)


def _kept_logit_gradient(
    logits_CB: Tensor,
    is_kept_CB: Tensor,
    log_normalizer: Tensor,
    labels: Tensor,
    gradient: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`_logit_gradient` of the softmax over the kept columns: the others have no probability, and no gradient."""
    return _logit_gradient(logits_CB.masked_fill(~is_kept_CB, -torch.inf), log_normalizer, labels, gradient, dtype)


def _logit_gradient(
    logits_CB: Tensor, log_normalizer: Tensor, labels: Tensor, gradient: Tensor, dtype: torch.dtype
) -> Tensor:
    """d log p(label) / d logit = [column is the label] - p(column), times the upstream gradient; in `dtype`."""
    columns = torch.arange(logits_CB.shape[1], device=logits_CB.device)
    negative = (logits_CB - log_normalizer[:, None]).exp_()
    negative.add_(columns == labels[:, None], alpha=-1)
    return negative.mul_(-gradient[:, None]).to(dtype)


def _relative_to(largest: Tensor, previous: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
    """(total, weighted) of _Sums when the exponents are taken relative to `largest` instead of `previous`."""
    shift = previous - largest
    return total * shift.exp(), (weighted + torch.where(total == 0, 0.0, shift * total)) * shift.exp()


def _finite(largest: Tensor) -> Tensor:
    """`largest` with 0 in place of -inf, the maximum over no columns: their sum is 0 relative to anything."""
    return torch.where(largest == -torch.inf, 0.0, largest)


@cache
def _elementwise(function: Callable, device_type: str) -> Callable:
    # On a GPU eager kernels would read and write a block of logits ten times, which takes as long as its matrix
    # products. On a CPU the block stays in the cache, and compilation needs a C++ compiler.
    return torch.compile(function, dynamic=True) if device_type == "cuda" else function


def _local_labels(labels_PC: Tensor, weight_VH: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Columns of the chunk's labels on this rank, [C]; outside 0 .. V-1 if another rank has the label's column."""
    return labels_PC.reshape(-1) - group.rank() * weight_VH.shape[0]


def _gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return local
    gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
    dist.all_gather_single(gathered, local, group=group)
    return gathered


def _reduce_scatter(gathered: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return gathered
    local = gathered.new_empty(gathered.shape[0] // group.size(), *gathered.shape[1:])
    dist.reduce_scatter_single(local, gathered, group=group)
    return local
