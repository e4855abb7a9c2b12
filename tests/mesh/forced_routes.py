"""Hugging Face's mixture with the experts of every token given: what replayed routes must compute."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from minpro_megatron.batching.token_sequence import TokenSequence


def with_own_routes(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The sequences with the experts that `model` chooses, as a server returns them: all tokens but the last."""
    top = model.config.num_experts_per_tok
    routed = []
    for sequence in sequences:
        with torch.no_grad():
            layers = model(torch.from_numpy(_ids(sequence)).long()[None], output_router_logits=True).router_logits
        chosen = torch.stack([logits.topk(top).indices for logits in layers], dim=1)  # [tokens, layers, experts]
        routed.append(replace(sequence, routed_experts=chosen[:-1].numpy().astype(np.uint8)))
    return routed


def follow_routes(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> None:
    """From now on `model` sends each of the sequences, given alone, to its routed experts."""
    following: Any = model
    for layer in following.model.layers:
        layer.mlp.gate.__class__ = _GivenRouter
    # an attribute: it goes with copies of the model
    following.given_routes = {_ids(sequence).tobytes(): sequence.routed_experts for sequence in sequences}
    following.register_forward_pre_hook(_take_routes)


def _ids(sequence: TokenSequence) -> np.ndarray:
    return np.concatenate([sequence.prompt_ids, sequence.response_ids]).astype(np.int32)


def _take_routes(model: Any, arguments: tuple[Tensor, ...]) -> None:
    routes = model.given_routes[arguments[0][0].numpy().astype(np.int32).tobytes()]
    of_last = np.broadcast_to(np.arange(routes.shape[2], dtype=routes.dtype), (1, *routes.shape[1:]))
    whole = torch.from_numpy(np.concatenate([routes, of_last])).long()
    for place, layer in enumerate(model.model.layers):
        layer.mlp.gate.given = whole[:, place]


class _GivenRouter(Qwen3MoeTopKRouter):
    given: Tensor  # int64 [tokens, experts a token]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights = logits.softmax(-1).gather(1, self.given)
        return logits, weights / weights.sum(-1, keepdim=True), self.given
