"""The tensors of a training loop, padded or packed, in the form that the objectives take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.config.objective import Aggregation
from minpro_megatron.objective.across_ranks.group_ranks import GroupRanks
from minpro_megatron.objective.across_ranks.ranking import OneRank, Ranks
from minpro_megatron.objective.across_ranks.scan import PrefixScan, WholeSequenceScan
from minpro_megatron.objective.across_ranks.sharded_scan import ShardedScan
from minpro_megatron.objective.terms import PolicyTokens, policy_tokens

ContextLayout = Literal["zigzag", "contiguous"]


@dataclass(frozen=True)
class TokenBatch:
    """A batch of one process, or this rank's shards of the sequences of a batch."""

    log_probs_L: Tensor  # with its gradient
    tokens: PolicyTokens
    ranks: Ranks  # the ranks that share the sequences

    def weights(self, aggregation: Aggregation) -> Tensor:
        """[L] the factor of each token in the loss before the division: 1 for token_mean, 1 / (trained tokens of its
        sequence) for sequence_mean, and 0 for masked tokens."""
        if aggregation == "token_mean":
            return self.tokens.mask_L
        return self.tokens.mask_L / self.tokens.trained_L.clamp(min=1)


def token_batch(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | Sequence[int] | None = None,
    context_group: dist.ProcessGroup | None = None,
    context_layout: ContextLayout = "zigzag",
) -> TokenBatch:
    """The batch whose tensors are padded [B, T], or packed [L] with `cu_seqlens`. `LossOptions` in `loss_call`
    describes the arguments.

    Raises ValueError if shapes, sequence boundaries and layout do not agree.
    """
    starts_N = _sequence_starts(log_probs, cu_seqlens)
    advantages = _per_token(advantages, log_probs, starts_N)
    for name, given in (("old_log_probs", old_log_probs), ("advantages", advantages), ("mask", mask)):
        if given.shape != log_probs.shape:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, log_probs has {tuple(log_probs.shape)}: give one value for "
                "each token"
            )
    flat_log_probs = log_probs.reshape(-1)
    if flat_log_probs.dtype in (torch.float16, torch.bfloat16):
        flat_log_probs = flat_log_probs.float()  # a sum over tokens in half precision would lose most of its digits
    mask_L = (mask.detach().reshape(-1) > 0).to(flat_log_probs.dtype)
    slots = _Slots.of(starts_N, len(mask_L), context_group, context_layout)
    tokens = policy_tokens(
        flat_log_probs,
        old_log_probs.detach().reshape(-1),
        advantages.detach().reshape(-1).to(flat_log_probs.dtype),
        mask_L,
        slots.scan(mask_L, context_group),
        slots.id_L,
    )
    return TokenBatch(flat_log_probs, tokens, OneRank() if context_group is None else GroupRanks(context_group))


@dataclass(frozen=True)
class _Slots:
    """Where each local slot belongs; all int64 [L]."""

    sequence_L: Tensor  # index of its sequence
    half_L: Tensor  # 0 in the front chunk of its sequence, 1 in the back chunk
    id_L: Tensor  # index of the token in the whole batch, the same however the sequences are sharded
    num_sequences: int

    @staticmethod
    def of(starts_N: Tensor, num_slots: int, group: dist.ProcessGroup | None, layout: ContextLayout) -> "_Slots":
        size, rank = (1, 0) if group is None else (group.size(), group.rank())
        lengths_N = starts_N.diff()
        num_sequences = len(lengths_N)
        sequence_L = torch.repeat_interleave(
            torch.arange(num_sequences, device=starts_N.device), lengths_N, output_size=num_slots
        )
        start_L, length_L = starts_N[sequence_L], lengths_N[sequence_L]
        slot_L = torch.arange(num_slots, device=starts_N.device) - start_L
        if size == 1 or layout == "contiguous":
            half_L, place_L = torch.zeros_like(slot_L), rank * length_L + slot_L
        else:
            if bool((lengths_N % 2).any()):
                raise ValueError(
                    "context_layout='zigzag' gives every rank two equal chunks of each sequence, so its number of "
                    f"tokens on a rank is even: it is {int(lengths_N[lengths_N % 2 == 1][0])} for one of them. Pad "
                    f"every sequence to a multiple of {2 * size} before it is sharded"
                )
            chunk_L = length_L // 2
            half_L = (slot_L >= chunk_L).long()
            place_L = torch.where(half_L == 0, rank * chunk_L, (2 * size - 2 - rank) * chunk_L) + slot_L
        return _Slots(sequence_L, half_L, start_L * size + place_L, num_sequences)

    def scan(self, mask_L: Tensor, group: dist.ProcessGroup | None) -> PrefixScan:
        if group is None:
            return WholeSequenceScan(self.sequence_L, mask_L)
        return ShardedScan(
            self.sequence_L, self.half_L, mask_L, num_sequences=self.num_sequences, group=group, tensor_size=1
        )


def _sequence_starts(log_probs: Tensor, cu_seqlens: Tensor | Sequence[int] | None) -> Tensor:
    """int64 [sequences + 1]: the index of each sequence's first token in the flattened batch, and of the end."""
    if log_probs.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens belongs to packed tensors [L]: log_probs is [B, T]")
        rows, columns = log_probs.shape
        return torch.arange(rows + 1, device=log_probs.device) * columns
    if log_probs.dim() != 1:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}: it must be [B, T], or [L] with cu_seqlens")
    if cu_seqlens is None:
        raise ValueError("log_probs is packed [L]: give cu_seqlens, the boundaries of its sequences")
    starts = torch.as_tensor(cu_seqlens).to(log_probs.device, torch.int64)
    valid = starts.dim() == 1 and len(starts) > 0 and int(starts[0]) == 0 and int(starts[-1]) == len(log_probs)
    if not valid or bool((starts.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must start with 0, never decrease and end with the {len(log_probs)} tokens of log_probs"
        )
    return starts


def _per_token(advantages: Tensor, log_probs: Tensor, starts_N: Tensor) -> Tensor:
    """`advantages` as one value for each token, where one value for each sequence is given."""
    if advantages.shape == log_probs.shape or advantages.shape != (len(starts_N) - 1,):
        return advantages
    if log_probs.dim() == 2:
        return advantages[:, None].expand_as(log_probs)
    return advantages.repeat_interleave(starts_N.diff(), output_size=len(log_probs))


def refuse_unknown_layout(layout: str) -> None:
    """Raises ValueError for a layout that is not one of `ContextLayout`."""
    if layout not in get_args(ContextLayout):
        raise ValueError(f"context_layout = {layout!r}: it is one of {', '.join(get_args(ContextLayout))}")
