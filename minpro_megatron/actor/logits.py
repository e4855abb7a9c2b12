"""The full logits of a few sequences on any mesh, to compare a model with another implementation of it.

Training never materializes them (parallel.log_probs). Here every rank holds all of them, so sequences must be short.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minpro_megatron.actor.forward import MicroBatch
from minpro_megatron.batching.collate import shard_row
from minpro_megatron.batching.row_lengths import padded_length, row_length
from minpro_megatron.batching.row_shard import RankSlice
from minpro_megatron.batching.shards import context_shard
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.parallel.mesh import Mesh


@torch.no_grad()
def sequence_logits(chunks: Sequence[GPTModel], mesh: Mesh, vocab_size: int, token_ids: np.ndarray) -> np.ndarray:
    """float32 [tokens, vocab_size] of one sequence of at least two tokens, on every rank. Collective.

    Logits are float32 products for every dtype of the model, as in training.
    """
    place = RankSlice(mesh.context.size(), mesh.context.rank(), mesh.tensor.size(), mesh.tensor.rank())
    sequence = _as_sequence(token_ids)
    lengths = [padded_length(sequence, place.context_size)]
    row_tokens = row_length(lengths, place.context_size, place.tensor_size)
    # the interleaved schedule needs a multiple of the number of stages: the same row is repeated
    repeats = mesh.pipeline.size() if len(chunks) > 1 else 1
    micro_batches = [MicroBatch(shard_row([sequence], row_tokens, place), 0, mesh.device)] * repeats
    iterators = [iter(micro_batches) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=_forward_step(mesh, vocab_size),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(micro_batches),
        seq_length=row_tokens,
        micro_batch_size=1,
        forward_only=True,
    )
    whole = torch.zeros(row_tokens, vocab_size, device=mesh.device)
    if outputs and mesh.tensor.rank() == 0 and mesh.data.rank() == 0:
        held = context_shard([row_tokens], place.context_size, place.context_rank)
        whole[torch.from_numpy(held).to(whole.device)] = outputs[0]
    dist.all_reduce(whole)  # every token belongs to one rank; the others add zero
    return whole[: len(token_ids)].cpu().numpy()


def _forward_step(mesh: Mesh, vocab_size: int) -> Callable:
    def logits(*, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, **unused: Any) -> Tensor:
        weight = output_layer.weight if output_weight is None else output_weight
        hidden = _gathered(hidden_states[:, 0], mesh.tensor, dim=0)
        return _gathered(hidden.float() @ weight.float().t(), mesh.tensor, dim=1)[:, :vocab_size]

    def step(micro_batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        micro_batch = next(micro_batches)
        output = model(
            micro_batch.tensor("input_ids_S")[None],
            micro_batch.tensor("position_ids_S")[None],
            None,
            packed_seq_params=micro_batch.packed_seq_params,
            output_processor=logits,
            output_processor_context=None,
        )
        return output, lambda found: (found.new_zeros(()), torch.zeros((), dtype=torch.int), found)

    return step


def _gathered(local: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim)


def _as_sequence(token_ids: np.ndarray) -> TokenSequence:
    count = len(token_ids) - 1
    nothing = np.zeros(count, np.float32)
    return TokenSequence(
        prompt_ids=token_ids[:1],
        response_ids=token_ids[1:],
        loss_mask=nothing,
        behavior_log_probs=nothing,
        rollout_log_probs=nothing,
        advantage=0.0,
        first_slot=0,
    )
