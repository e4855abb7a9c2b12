"""The forward pass of one micro-batch: from the tensors of a row shard to the log-probs and entropies of its tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from minpro_megatron.actor.routing import Routing
from minpro_megatron.batching.row_shard import RowShard
from minpro_megatron.batching.supports import RowSupports
from minpro_megatron.parallel.kept_columns import KeptColumns
from minpro_megatron.parallel.log_probs import kept_log_probs, vocab_parallel_log_probs
from minpro_megatron.parallel.mesh import Mesh


@dataclass(frozen=True)
class MicroBatch:
    """A row shard on the rank's device."""

    row: RowShard
    index: int  # its index in the mini-batch on this data-parallel rank
    device: torch.device
    surveyed_L: Tensor | None = None  # result of the objective's survey of the mini-batch, per slot
    supports: RowSupports | None = None  # with support replay, on the last pipeline stage

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
            # Megatron counts rotary positions from the start of the row instead of each sequence's start if this equals
            # the row's length. That happens only if the row is one sequence, where both are the same.
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            pad_between_seqs=False,  # padding is part of its sequence; with None every layer would synchronize to check
        )


@dataclass(frozen=True)
class TokenScores:
    """The model's results for the slots of a micro-batch. float32 [L]; only the log-probs carry a gradient.

    With support replay the log-probs are those of the softmax over the kept ids, the entropies those of the whole
    softmax.
    """

    log_probs_L: Tensor
    entropies_L: Tensor
    kept_masses_L: Tensor | None = None  # the probability of the kept ids in the whole softmax, with support replay


# Computed by the last pipeline stage from a micro-batch's scores, in the form that Megatron's schedules require:
# (scalar to differentiate, int count that the gradients are divided by, any value to return).
LossFunction = Callable[[TokenScores, MicroBatch], tuple[Tensor, Tensor, Any]]


@dataclass(frozen=True)
class ForwardStep:
    """Megatron's forward_step_func. A new one is made for every pass over the micro-batches: they differ in `loss`."""

    mesh: Mesh
    vocab_size: int
    temperature: float
    loss: LossFunction
    routing: Routing

    def __call__(self, micro_batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        micro_batch = next(micro_batches)
        chunk = cast(int | None, get_attr_wrapped_model(model, "vp_stage"))  # None without interleaving
        with self.routing.around(chunk or 0, micro_batch.index, num_slots=len(micro_batch.row.mask_L)):
            output = model(
                micro_batch.tensor("input_ids_S")[None],
                micro_batch.tensor("position_ids_S")[None],
                None,
                packed_seq_params=micro_batch.packed_seq_params,
                output_processor=self._scores,
                output_processor_context=micro_batch,
            )
        return output, lambda output_NL: self.loss(TokenScores(output_NL[0], *output_NL[1:].detach()), micro_batch)

    def _scores(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: MicroBatch,
        **unused: Any,
    ) -> Tensor:
        """The tensors of TokenScores that there are, [2 or 3, L], from the sequence-sharded hidden states [L, 1, H]."""
        weight = output_layer.weight if output_weight is None else output_weight
        inputs = hidden_states[:, 0], weight, context.tensor("label_ids_S")
        settings = {"vocab_size": self.vocab_size, "temperature": self.temperature, "group": self.mesh.tensor}
        if context.supports is None:
            return torch.stack(vocab_parallel_log_probs(*inputs, **settings))
        columns = len(weight)
        kept = KeptColumns.of(*context.supports, self.mesh.tensor.rank() * columns, columns, weight.device)
        return torch.stack(kept_log_probs(*inputs, kept, **settings))
