"""Hugging Face's mixtures with the experts of every token given: what replayed routes must compute."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from minpro_megatron.batching.token_sequence import TokenSequence


def with_own_routes(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """The sequences with the experts that `model` chooses, as a server returns them: all tokens but the last, and zeros
    for layers without experts."""
    routed = []
    for sequence in sequences:
        ids = torch.from_numpy(_ids(sequence)).long()
        chosen = np.zeros((len(ids), model.config.num_hidden_layers, model.config.num_experts_per_tok), np.uint8)

        def look(_: Any, __: Any, output: Any, of_layer: np.ndarray) -> None:
            of_layer[:] = output[2].numpy()

        hooks = [gate.register_forward_hook(partial(look, of_layer=chosen[:, at])) for at, gate in _gates(model)]
        with torch.no_grad():
            model(ids[None])
        for hook in hooks:
            hook.remove()
        routed.append(replace(sequence, routed_experts=chosen[:-1]))
    return routed


def follow_routes(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> None:
    """From now on `model` sends each of the sequences, given alone, to its routed experts."""
    following: Any = model
    for _, gate in _gates(model):
        gate.__class__ = _GIVEN[type(gate)]
    # an attribute: it goes with copies of the model
    following.given_routes = {_ids(sequence).tobytes(): sequence.routed_experts for sequence in sequences}
    following.register_forward_pre_hook(_take_routes)


def _gates(model: Any) -> list[tuple[int, Any]]:
    """(number of the layer, its router) of the layers that have experts."""
    return [(at, layer.mlp.gate) for at, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")]


def _ids(sequence: TokenSequence) -> np.ndarray:
    return np.concatenate([sequence.prompt_ids, sequence.response_ids]).astype(np.int32)


def _take_routes(model: Any, arguments: tuple[Tensor, ...]) -> None:
    routes = model.given_routes[arguments[0][0].numpy().astype(np.int32).tobytes()]
    of_last = np.broadcast_to(np.arange(routes.shape[2], dtype=routes.dtype), (1, *routes.shape[1:]))
    whole = torch.from_numpy(np.concatenate([routes, of_last])).long()
    for layer, gate in _gates(model):
        gate.given = whole[:, layer]


class _GivenRouter(Qwen3MoeTopKRouter):
    given: Tensor  # int64 [tokens, experts a token]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights = logits.softmax(-1).gather(1, self.given)
        return logits, weights / weights.sum(-1, keepdim=True), self.given


class _GivenSigmoids(Glm4MoeTopkRouter):
    given: Tensor  # int64 [tokens, experts a token]

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights = logits.sigmoid().gather(1, self.given)
        return logits, self.routed_scaling_factor * weights / weights.sum(-1, keepdim=True), self.given


_GIVEN: dict[type, type] = {Qwen3MoeTopKRouter: _GivenRouter, Glm4MoeTopkRouter: _GivenSigmoids}
