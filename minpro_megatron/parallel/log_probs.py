"""Log-probs of the labels from sequence-sharded hidden states, without ever holding the row's logits.

Shapes: L tokens of this tensor rank's sequence piece, P tensor ranks, C tokens of a chunk, V vocabulary columns of
this rank, H hidden size. One chunk at a time: gather the chunk's hidden states over the tensor ranks, multiply with
this rank's vocabulary columns, reduce a few numbers a token over the ranks, keep the own tokens' results. Backward
computes each chunk's logits again.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_LOGITS = 64 << 20  # largest number of float32 logits held at once, in one chunk's gathered block


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
    """(log-probs, entropies) of the own tokens, float32 [L]; the entropies carry no gradient.

    `label_ids_S` are the labels of all P x L tokens of the context shard, in tensor-rank order. Columns at and past
    `vocab_size` (padding) are outside the softmax and get no gradient. Logits are divided by `temperature`.
    With one rank in `group` nothing is communicated.
    """
    chunk = chunk_tokens or max(1, CHUNK_LOGITS // (weight_VH.shape[0] * group.size()))
    real_columns = max(0, min(weight_VH.shape[0], vocab_size - group.rank() * weight_VH.shape[0]))
    labels_PL = label_ids_S.view(group.size(), -1)
    return _VocabParallelLogProbs.apply(hidden_LH, weight_VH, labels_PL, real_columns, temperature, group, chunk)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: Tensor,
        weight_VH: Tensor,
        labels_PL: Tensor,
        real_columns: int,
        temperature: float,
        group: dist.ProcessGroup,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        num_tokens = hidden_LH.shape[0]
        log_probs = hidden_LH.new_empty(num_tokens, dtype=torch.float32)
        entropies = torch.empty_like(log_probs)
        log_normalizer_PL = hidden_LH.new_empty(labels_PL.shape, dtype=torch.float32)
        for start in range(0, num_tokens, chunk):
            part = slice(start, min(start + chunk, num_tokens))
            logits = _chunk_logits(hidden_LH[part], weight_VH, real_columns, temperature, group)[1]
            log_prob, entropy, normalizer = _reduce_over_vocabulary(
                logits, labels_PL[:, part].reshape(-1), weight_VH.shape[0], group
            )
            log_normalizer_PL[:, part] = normalizer.view(group.size(), -1)
            log_probs[part] = log_prob.view(group.size(), -1)[group.rank()]
            entropies[part] = entropy.view(group.size(), -1)[group.rank()]
        ctx.save_for_backward(hidden_LH, weight_VH, labels_PL, log_normalizer_PL)
        ctx.settings = (real_columns, temperature, group, chunk)
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_LH, weight_VH, labels_PL, log_normalizer_PL = ctx.saved_tensors
        real_columns, temperature, group, chunk = ctx.settings
        gradient_PL = _gather(gradients[0].contiguous(), group).view(labels_PL.shape)
        d_hidden = torch.empty_like(hidden_LH)
        d_weight = torch.zeros_like(weight_VH, dtype=torch.float32)
        for start in range(0, hidden_LH.shape[0], chunk):
            part = slice(start, min(start + chunk, hidden_LH.shape[0]))
            gathered, logits = _chunk_logits(hidden_LH[part], weight_VH, real_columns, temperature, group)
            scale = (gradient_PL[:, part] / temperature).reshape(-1, 1)
            normalizer = log_normalizer_PL[:, part].reshape(-1, 1)
            # d log p(label) / d logit_v = [v is the label] - p_v; padding columns have logit -inf, so p_v = 0
            d_logits = logits.sub_(normalizer).exp_().mul_(-scale)
            local, mine = _local_labels(labels_PL[:, part].reshape(-1), weight_VH.shape[0], group)
            d_logits.scatter_add_(1, local[:, None], torch.where(mine[:, None], scale, 0.0))
            d_logits = d_logits.to(weight_VH.dtype)
            d_weight += d_logits.t() @ gathered
            d_hidden[part] = _reduce_scatter(d_logits @ weight_VH, group)
        return d_hidden, d_weight.to(weight_VH.dtype), None, None, None, None, None


def _chunk_logits(
    hidden_CH: Tensor, weight_VH: Tensor, real_columns: int, temperature: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    gathered = _gather(hidden_CH.contiguous(), group)
    logits = (gathered @ weight_VH.t()).float().div_(temperature)
    logits[:, real_columns:] = -torch.inf
    return gathered, logits


def _reduce_over_vocabulary(
    logits: Tensor, labels: Tensor, columns: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob of the label, entropy, log-sum-exp) of every gathered token, the same on all ranks of `group`."""
    largest = logits.amax(dim=1)
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    local, mine = _local_labels(labels, columns, group)
    target = torch.where(mine, logits.gather(1, local[:, None])[:, 0] - largest, 0.0)
    shifted = logits - largest[:, None]
    exponentials = shifted.exp()
    weighted = (exponentials * shifted.masked_fill_(exponentials == 0, 0.0)).sum(dim=1)
    sums = torch.stack([exponentials.sum(dim=1), weighted, target])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    total, weighted, target = sums
    log_total = total.log()
    return target - log_total, log_total - weighted / total, largest + log_total


def _local_labels(labels: Tensor, columns: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(column of the label on this rank, 0 elsewhere; whether the label is on this rank)."""
    local = labels - group.rank() * columns
    mine = (local >= 0) & (local < columns)
    return torch.where(mine, local, 0), mine


def _gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return local
    gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local, group=group)
    return gathered


def _reduce_scatter(gathered: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() == 1:
        return gathered
    local = gathered.new_empty(gathered.shape[0] // group.size(), *gathered.shape[1:])
    dist.reduce_scatter_tensor(local, gathered.contiguous(), group=group)
    return local
