"""One micro-batch through the model: tensors of a row shard, log-probs from hidden states, the loss."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from minpro_megatron.batching.collate import RowShard
from minpro_megatron.objective.diagnostics import Statistic, token_statistics
from minpro_megatron.objective.registry import Objective
from minpro_megatron.objective.terms import policy_tokens, summed_loss
from minpro_megatron.parallel.log_probs import vocab_parallel_log_probs
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.parallel.prefix_scan import ShardedScan


@dataclass(frozen=True)
class MicroBatch:
    """A row shard on the rank's device."""

    row: RowShard
    device: torch.device

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(getattr(self.row, name)).to(self.device, non_blocking=True)

    @cached_property
    def packed_seq_params(self) -> PackedSeqParams:
        lengths = self.row.padded_lengths
        boundaries = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        cu_seqlens = torch.from_numpy(boundaries).to(self.device)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=cu_seqlens,
            cu_seqlens_kv_padded=cu_seqlens,
            # megatron takes rotary positions from the whole row, not from each sequence's start, if this equals the
            # row's length: it does only when the row is one sequence, where both are the same
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        )


@dataclass(frozen=True)
class LossSettings:
    """What turns log-probs into the loss of a run."""

    objective: Objective
    objective_settings: Any
    vocab_size: int
    temperature: float


class ForwardStep:
    """Megatron's forward_step_func for `mode` "score" (log-probs out) or "train" (loss out)."""

    def __init__(self, mesh: Mesh, settings: LossSettings, train: bool) -> None:
        self._mesh = mesh
        self._settings = settings
        self._loss = self._train_loss if train else self._score_output

    def __call__(self, micro_batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        micro_batch = next(micro_batches)
        output = model(
            micro_batch.tensor("input_ids_S")[None],
            micro_batch.tensor("position_ids_S")[None],
            None,
            packed_seq_params=micro_batch.packed_seq_params,
            output_processor=self._log_probs_and_entropies,
            output_processor_context=micro_batch,
        )
        return output, lambda output_2L: self._loss(output_2L, micro_batch)

    def _log_probs_and_entropies(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: MicroBatch,
        **unused: Any,
    ) -> Tensor:
        """[2, L]: log-probs of the labels, and entropies, from the sequence-sharded hidden states [L, 1, H]."""
        log_probs, entropies = vocab_parallel_log_probs(
            hidden_states[:, 0],
            output_layer.weight if output_weight is None else output_weight,
            context.tensor("label_ids_S"),
            vocab_size=self._settings.vocab_size,
            temperature=self._settings.temperature,
            group=self._mesh.tensor,
        )
        return torch.stack([log_probs, entropies])

    def _score_output(
        self, output_2L: Tensor, micro_batch: MicroBatch
    ) -> tuple[Tensor, Tensor, tuple[Tensor, np.ndarray]]:
        nothing = output_2L.new_zeros(())
        return nothing, nothing.int(), (output_2L[0].detach(), micro_batch.row.flat_slot_L)

    def _train_loss(self, output_2L: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Statistic]]:
        log_probs, entropies = output_2L[0], output_2L[1].detach()
        settings, row = self._settings, micro_batch.row
        mask, behavior = micro_batch.tensor("mask_L"), micro_batch.tensor("behavior_log_probs_L")
        scan = ShardedScan(
            micro_batch.tensor("sequence_L"),
            micro_batch.tensor("half_L"),
            mask,
            num_sequences=len(row.padded_lengths),
            group=self._mesh.tensor_and_context,
            tensor_size=self._mesh.tensor.size(),
        )
        tokens = policy_tokens(log_probs, behavior, micro_batch.tensor("advantages_L"), mask, scan)
        terms = settings.objective(tokens, settings.objective_settings)
        by_sequence = settings.objective_settings.aggregation == "sequence_mean"
        weight = micro_batch.tensor("sequence_weight_L") if by_sequence else mask
        # megatron divides the gradients by the sum of these counts over micro-batches, data and context ranks
        count = row.num_sequences if by_sequence else row.num_tokens
        statistics = token_statistics(tokens, terms, entropies, micro_batch.tensor("rollout_log_probs_L"), behavior)
        return (
            summed_loss(log_probs, terms, weight),
            torch.tensor(count, dtype=torch.int, device=log_probs.device),
            statistics,
        )
