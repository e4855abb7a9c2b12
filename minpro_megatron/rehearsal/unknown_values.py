"""Values on which Megatron's control flow depends, and which fake tensors do not have.

A rehearsal assumes: every expert gets the same number of tokens, times an imbalance for what arrives from other ranks;
the neighbouring pipeline stages send what this rank sends them; the other ranks answer what this rank answers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from transformer_engine.pytorch import GroupedLinear

from minpro_megatron.rehearsal.observer import Observer


def assume_even_routing(observer: Observer, imbalance: float) -> None:
    """Replaces the numbers of tokens that the dispatcher reads from the device. `imbalance`: rows that arrive over rows
    that are sent."""
    dispatcher: Any = MoEAlltoAllTokenDispatcher
    original = dispatcher._maybe_dtoh_and_synchronize

    def synchronize(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        counts = original(self, point, tokens_per_expert)
        if point == "before_permutation_1":
            observer.selected_rows = int(self.num_out_tokens)
        if point != self.cuda_dtoh_point:
            return counts
        sent = int(self.num_out_tokens)
        arriving = round(sent * imbalance)
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits, self.output_splits = _even(sent, self.ep_size), _even(arriving, self.ep_size)
            self.output_splits_tp = np.full(self.tp_size, arriving)
            arriving *= self.tp_size
        else:
            arriving = sent
        found: Any = torch.empty(self.num_local_experts, dtype=torch.int64)  # on the host, as the copy is
        found.known_values = _even(arriving, self.num_local_experts).tolist()
        return found

    dispatcher._maybe_dtoh_and_synchronize = synchronize


def _even(total: int, parts: int) -> np.ndarray:
    sizes = np.full(parts, total // parts)
    sizes[: total % parts] += 1
    return sizes


def keep_rows_of_experts() -> None:
    """Megatron gives the rows of each expert to Transformer Engine as a list, which it makes a tensor of, and a list
    again: the tensor keeps the list."""
    layer: Any = GroupedLinear
    original = layer.forward

    def forward(self: Any, rows: torch.Tensor, sizes: list[int], **settings: Any) -> Any:
        on_host: Any = torch.empty(len(sizes), dtype=torch.int64)
        on_host.known_values = list(sizes)
        return original(self, rows, on_host, **settings)

    layer.forward = forward


@contextmanager
def received_shapes(shape: Sequence[int]) -> Iterator[None]:
    """Context manager. Replaces the shapes that pipeline stages tell each other: all hidden states have `shape`."""
    communicator: Any = P2PCommunicator
    original = communicator._communicate_shapes

    def communicate(self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool) -> Any:
        original(self, send_next, send_prev, recv_prev, recv_next)
        return (list(shape) if recv_prev else [0, 0, 0]), (list(shape) if recv_next else [0, 0, 0])

    communicator._communicate_shapes = communicate
    try:
        yield
    finally:
        communicator._communicate_shapes = original
