"""Log-probs of the labels from sequence-sharded hidden states, without materializing the row's logits.

Shapes: L tokens of this tensor rank's sequence piece, P tensor ranks, C gathered tokens of a chunk, V vocabulary
columns of this rank, B columns of a block, H hidden size.

A chunk of tokens is gathered over the tensor ranks. Its logits are computed in blocks of columns, and only a few
numbers per token are kept of each block. Ranks exchange those once per chunk. Backward recomputes each block's logits.
Blocks in both directions keep memory traffic small: a block of logits is read from where it was just written, and the
gradients of the weight are accessed once per chunk, those of the hidden states once per block.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

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
    tokens, columns = CUDA_BLOCK if hidden_LH.is_cuda else CPU_BLOCK
    chunk = chunk_tokens or max(1, tokens // group.size())
    real_columns = max(0, min(weight_VH.shape[0], vocab_size - group.rank() * weight_VH.shape[0]))
    labels_PL = label_ids_S.view(group.size(), -1)
    settings = _Settings(real_columns, temperature, group, chunk, columns)
    return _VocabParallelLogProbs.apply(hidden_LH, weight_VH, labels_PL, settings)


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
        ctx: Any, hidden_LH: Tensor, weight_VH: Tensor, labels_PL: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor]:
        group = settings.group
        log_probs = hidden_LH.new_empty(hidden_LH.shape[0], dtype=torch.float32)
        entropies = torch.empty_like(log_probs)
        log_normalizer_PL = hidden_LH.new_empty(labels_PL.shape, dtype=torch.float32)
        for part in settings.chunks(hidden_LH.shape[0]):
            hidden_CH = _gather(hidden_LH[part].contiguous(), group)
            sums = _sums_over_columns(
                hidden_CH, weight_VH, _local_labels(labels_PL[:, part], weight_VH, group), settings
            )
            log_prob, entropy, normalizer = _over_ranks(sums, group)
            log_normalizer_PL[:, part] = normalizer.view(group.size(), -1)
            log_probs[part] = log_prob.view(group.size(), -1)[group.rank()]
            entropies[part] = entropy.view(group.size(), -1)[group.rank()]
        ctx.save_for_backward(hidden_LH, weight_VH, labels_PL, log_normalizer_PL)
        ctx.settings = settings
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_LH, weight_VH, labels_PL, log_normalizer_PL = ctx.saved_tensors
        settings, group = ctx.settings, ctx.settings.group
        gradient_PL = _gather(gradients[0].contiguous(), group).view(labels_PL.shape)
        logit_gradient = _elementwise(_logit_gradient, hidden_LH.device.type)
        d_hidden = torch.empty_like(hidden_LH)
        d_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        for part in settings.chunks(hidden_LH.shape[0]):
            hidden_CH = _operand(_gather(hidden_LH[part].contiguous(), group))
            labels = _local_labels(labels_PL[:, part], weight_VH, group)
            normalizer, gradient = log_normalizer_PL[:, part].reshape(-1), gradient_PL[:, part].reshape(-1)
            d_hidden_CH = torch.zeros_like(hidden_CH, dtype=torch.float32)
            for block in settings.blocks():
                weight_BH = _operand(weight_VH[block])
                logits = _product(hidden_CH, weight_BH.t(), 1 / settings.temperature)
                d_logits = logit_gradient(logits, normalizer, labels - block.start, gradient, hidden_CH.dtype)
                del logits
                _add_product(d_weight[block], d_logits.t(), hidden_CH, 1 / settings.temperature)
                _add_product(d_hidden_CH, d_logits, weight_BH, 1 / settings.temperature)
                del d_logits  # before the next block's are made
            d_hidden[part] = _reduce_scatter(d_hidden_CH, group)
        return d_hidden, d_weight.to(weight_VH.dtype), None, None


class _Sums(NamedTuple):
    """Sums for every gathered token over some of the vocabulary's columns; float32 [C] each. z are the logits."""

    largest: Tensor  # max z; -inf over no columns
    total: Tensor  # sum of exp(z - largest)
    weighted: Tensor  # sum of exp(z - largest) (z - largest)
    label: Tensor  # z of the label, 0 if it is not among the columns
    found: Tensor  # 1 if the label is among the columns, else 0


def _sums_over_columns(hidden_CH: Tensor, weight_VH: Tensor, labels: Tensor, settings: _Settings) -> _Sums:
    add_block = _elementwise(_add_block, hidden_CH.device.type)
    hidden_CH = _operand(hidden_CH)
    zero = hidden_CH.new_zeros(len(hidden_CH), dtype=torch.float32)
    largest, total, weighted, label, found = torch.full_like(zero, -torch.inf), zero, zero, zero, zero
    for block in settings.blocks():
        logits = _product(hidden_CH, _operand(weight_VH[block]).t(), 1 / settings.temperature)
        column = labels - block.start
        inside = (column >= 0) & (column < logits.shape[1])
        here = logits.gather(1, torch.where(inside, column, 0)[:, None])[:, 0]
        label, found = torch.where(inside, here, label), found + inside
        largest, total, weighted = add_block(logits, largest, total, weighted)
    return _Sums(largest, total, weighted, label, found)


def _over_ranks(sums: _Sums, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob of the label, entropy, log-sum-exp) of every gathered token, the same on all ranks of `group`."""
    largest = sums.largest.clone()
    if group.size() > 1:
        # the maximum of gloo and NCCL may drop a NaN, but a rank that has a NaN also has it in its sums
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total, weighted = _relative_to(largest, sums.largest, sums.total, sums.weighted)
    summed = torch.stack([total, weighted, sums.label, sums.found])
    if group.size() > 1:
        dist.all_reduce(summed, group=group)
    total, weighted, label, found = summed
    log_total = total.log()
    # A logit of -inf adds only 0 to `total` but makes `weighted` NaN: propagate the NaN
    valid = torch.where((found > 0) & ~weighted.isnan(), 0.0, torch.nan)
    return label - largest - log_total + valid, log_total - weighted / total + valid, largest + log_total + valid


# The next two functions process every logit. On a GPU each is compiled into one kernel; on a CPU they run eagerly.


def _add_block(logits_CB: Tensor, largest: Tensor, total: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`largest`, `total` and `weighted` (see _Sums) over the previous columns and those of the block."""
    previous, largest = largest, torch.maximum(largest, logits_CB.amax(dim=1))
    total, weighted = _relative_to(largest, previous, total, weighted)
    shifted = logits_CB - largest[:, None]
    exponentials = shifted.exp()
    return largest, total + exponentials.sum(dim=1), weighted + (exponentials * shifted).sum(dim=1)


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


@cache
def _elementwise(function: Callable, device_type: str) -> Callable:
    # On a GPU eager kernels would read and write a block of logits ten times, which takes as long as its matrix
    # products. On a CPU the block stays in the cache, and compilation needs a C++ compiler.
    return torch.compile(function, dynamic=True) if device_type == "cuda" else function


def _operand(matrix: Tensor) -> Tensor:
    """The matrix in the dtype that the products below need: on a CPU the result is float32 only for float32."""
    return matrix if matrix.is_cuda else matrix.float()


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right in float32, accumulated in float32, also for bfloat16 operands."""
    if left.is_cuda:
        out = left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)
        return _addmm(out, left, right, scale, beta=0)
    out = _cpu_product(left, right)
    return out if scale == 1 else out.mul_(scale)


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """out += scale * left @ right for float32 `out`."""
    if left.is_cuda:
        _addmm(out, left, right, scale, beta=1)
    else:
        out.add_(_cpu_product(left, right), alpha=scale)


def _addmm(out: Tensor, left: Tensor, right: Tensor, scale: float, beta: int) -> Tensor:
    if left.dtype == torch.float32:
        return out.addmm_(left, right, beta=beta, alpha=scale)
    return torch.addmm(out, left, right, out_dtype=torch.float32, beta=beta, alpha=scale, out=out)


def _cpu_product(left: Tensor, right: Tensor) -> Tensor:
    if not torch.backends.mkldnn.is_available():
        return left @ right
    # torch.mm uses MKL, which does not use AVX-512 on AMD: 180 GFLOP/s instead of 400 with oneDNN (Zen 5, 2 cores).
    # A tensor in oneDNN's layout makes torch compute a float32 product with oneDNN.
    return functional.linear(left.to_mkldnn(), right.t()).to_dense()


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
