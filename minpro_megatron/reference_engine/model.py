"""The supported models in float32, one token of one sequence at a time.

The arithmetic for a token depends only on the weights and on the tokens before it: not on a batch, other sequences, or
shapes that vary with other requests. On one thread the same tokens therefore give the same bits. The formulas are those
of transformers 5.19 (models/qwen3_moe/modeling_qwen3_moe.py and its neighbours). On a tiny model, where the time per
token is mostly overhead, this implementation is four times as fast.

Shapes: V vocabulary, H hidden, Q query heads, G key/value heads, D head, T tokens so far, F feed-forward, E experts,
K experts of a token.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, UntypedStorage
from torch.nn import functional

from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.weights.hf_files import HfReader
from minpro_megatron.weights.rotary import inverse_frequencies


class KeyValueCache:
    """Keys and values of the first `num_tokens` tokens of a sequence, and the chosen experts per token and layer."""

    def __init__(self, architecture: Architecture, capacity: int) -> None:
        self._architecture = architecture
        # Positions are the first dimension: a token's values then have the same offset in a cache of any capacity.
        shape = (max(capacity, 1), 2, architecture.num_query_groups, architecture.head_dim)
        self.layers = [torch.empty(shape) for _ in range(architecture.num_layers)]  # [capacity, 2, G, D]
        self.num_tokens = 0
        self.routes_K: list[Tensor] = []  # by token, then by layer; empty for a dense model

    def copy(self, capacity: int) -> "KeyValueCache":
        """A cache for `capacity` tokens that starts with the same values."""
        copied = KeyValueCache(self._architecture, capacity)
        for ours, theirs in zip(self.layers, copied.layers, strict=True):
            theirs[: self.num_tokens] = ours[: self.num_tokens]
        copied.num_tokens = self.num_tokens
        copied.routes_K = self.routes_K.copy()
        return copied


class _Attention:
    def __init__(self, model: Architecture) -> None:
        self._query_heads, self._groups, self._head = model.num_attention_heads, model.num_query_groups, model.head_dim
        self._rotary = model.rotary_dim
        self._norm_epsilon = model.norm_epsilon
        heads = self._query_heads + 2 * self._groups
        self._query_key_value = torch.empty(heads * self._head, model.hidden_size)
        self._output = torch.empty(model.hidden_size, self._query_heads * self._head)
        self._bias = torch.empty(heads * self._head) if model.qkv_bias else None
        self._norms_D = torch.empty(2, self._head) if model.qk_norm else None  # of the queries, and of the keys
        self._nothing = torch.zeros(1)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        queries, groups = self._query_heads * self._head, self._groups * self._head
        for kind, together in (("weight", self._query_key_value), ("bias", self._bias)):
            if together is not None:
                parts = together.split([queries, groups, groups])
                yield from zip((f"q_proj.{kind}", f"k_proj.{kind}", f"v_proj.{kind}"), parts, strict=True)
        yield "o_proj.weight", self._output
        if self._norms_D is not None:
            yield from (("q_norm.weight", self._norms_D[0]), ("k_norm.weight", self._norms_D[1]))

    def __call__(self, hidden_H: Tensor, cache: Tensor, position: int, cosine_D: Tensor, sine_D: Tensor) -> Tensor:
        projected = self._query_key_value @ hidden_H
        if self._bias is not None:
            projected = projected + self._bias
        heads = projected.view(-1, self._head)
        rotated, values = heads.split([self._query_heads + self._groups, self._groups])
        if self._norms_D is not None:
            queries, keys = rotated.split([self._query_heads, self._groups])
            rotated = torch.cat((self._norm(queries, self._norms_D[0]), self._norm(keys, self._norms_D[1])))
        rotated = self._rotate(rotated, cosine_D, sine_D)
        queries, keys = rotated.split([self._query_heads, self._groups])
        cache[position, 0], cache[position, 1] = keys, values
        keys_GDT = cache[: position + 1, 0].permute(1, 2, 0)
        values_GTD = cache[: position + 1, 1].transpose(0, 1)
        queries_GqD = queries.view(self._groups, -1, self._head)
        scores = torch.baddbmm(self._nothing, queries_GqD, keys_GDT, beta=0, alpha=self._head**-0.5).softmax(-1)
        return self._output @ torch.bmm(scores, values_GTD).view(-1)

    def _rotate(self, heads: Tensor, cosine_D: Tensor, sine_D: Tensor) -> Tensor:
        if self._rotary == self._head:
            return torch.addcmul(heads * cosine_D, heads.roll(self._head // 2, -1), sine_D)
        turned, still = heads.split([self._rotary, self._head - self._rotary], -1)
        return torch.cat((torch.addcmul(turned * cosine_D, turned.roll(self._rotary // 2, -1), sine_D), still), -1)

    def _norm(self, heads: Tensor, weight_D: Tensor) -> Tensor:
        return functional.rms_norm(heads, (self._head,), weight_D, self._norm_epsilon)


class _FeedForward:
    def __init__(self, model: Architecture, width: int) -> None:
        self._gate_up = torch.empty(2 * width, model.hidden_size)
        self._down = torch.empty(model.hidden_size, width)
        # A server's routes have a place for every layer, with zeros where there are no experts.
        self._no_route_K = torch.zeros(model.num_experts_per_token, dtype=torch.long) if model.num_experts else None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        gate, up = self._gate_up.chunk(2)
        yield from (("gate_proj.weight", gate), ("up_proj.weight", up), ("down_proj.weight", self._down))

    def __call__(self, hidden_H: Tensor, routes_K: list[Tensor]) -> Tensor:
        if self._no_route_K is not None:
            routes_K.append(self._no_route_K)
        return self.output(hidden_H)

    def output(self, hidden_H: Tensor) -> Tensor:
        gate_F, up_F = (self._gate_up @ hidden_H).chunk(2)
        return self._down @ (functional.silu(gate_F) * up_F)


class _Experts:
    def __init__(self, model: Architecture) -> None:
        self._router = torch.empty(model.num_experts, model.hidden_size)
        self._gate_up = torch.empty(model.num_experts, 2 * model.expert_ffn_hidden_size, model.hidden_size)
        self._down = torch.empty(model.num_experts, model.hidden_size, model.expert_ffn_hidden_size)
        self._chosen = model.num_experts_per_token
        self._normalized, self._scale = model.normalized_routing, model.routing_scale
        self._choice_bias = torch.empty(model.num_experts) if model.sigmoid_routing else None
        self._shared = _FeedForward(model, model.shared_ffn_hidden_size) if model.shared_ffn_hidden_size else None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "gate.weight", self._router
        if self._choice_bias is not None:
            yield "gate.e_score_correction_bias", self._choice_bias
        if self._shared is not None:
            yield from ((f"shared_experts.{name}", weight) for name, weight in self._shared.weights())
        for expert, (gate_up, down) in enumerate(zip(self._gate_up, self._down, strict=True)):
            gate, up = gate_up.chunk(2)
            for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
                yield f"experts.{expert}.{name}.weight", weight

    def __call__(self, hidden_H: Tensor, routes_K: list[Tensor]) -> Tensor:
        shares_K, experts_K = self._choice(self._router @ hidden_H)
        routes_K.append(experts_K)
        output_H = torch.zeros_like(hidden_H) if self._shared is None else self._shared.output(hidden_H)
        for expert, share in zip(experts_K.tolist(), shares_K.tolist(), strict=True):
            gate_F, up_F = (self._gate_up[expert] @ hidden_H).chunk(2)
            output_H.add_(self._down[expert] @ (functional.silu(gate_F) * up_F), alpha=share)
        return output_H

    def _choice(self, logits_E: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, numbers) of the token's experts."""
        if self._choice_bias is None:
            shares_K, experts_K = logits_E.softmax(-1).topk(self._chosen)
        else:
            scores_E = logits_E.sigmoid()
            experts_K = (scores_E + self._choice_bias).topk(self._chosen).indices
            shares_K = scores_E[experts_K]
        if self._normalized:
            shares_K = shares_K / shares_K.sum()
        return shares_K * self._scale, experts_K


class _Layer:
    def __init__(self, model: Architecture, index: int) -> None:
        self.attention = _Attention(model)
        self.feed_forward = _Experts(model) if model.has_experts(index) else _FeedForward(model, model.ffn_hidden_size)
        self.attention_norm_H, self.feed_forward_norm_H = torch.empty(2, model.hidden_size)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "input_layernorm.weight", self.attention_norm_H
        yield "post_attention_layernorm.weight", self.feed_forward_norm_H
        for part, owner in (("self_attn", self.attention), ("mlp", self.feed_forward)):
            for name, weight in owner.weights():
                yield f"{part}.{name}", weight


class Model:
    """The weights by their Hugging Face names, and the forward pass over one token."""

    def __init__(self, architecture: Architecture, max_tokens: int) -> None:
        """`max_tokens`: the maximum length of a sequence. The weights are uninitialized until `load`."""
        self.architecture = architecture
        self._embedding_VH = torch.empty(architecture.vocab_size, architecture.hidden_size)
        self._layers = [_Layer(architecture, index) for index in range(architecture.num_layers)]
        self._norm_H = torch.empty(architecture.hidden_size)
        self._head_VH = self._embedding_VH if architecture.tied_embeddings else torch.empty_like(self._embedding_VH)
        self._cosines, self._sines = _rotations(architecture, max_tokens)
        self.weights: Mapping[str, Tensor] = dict(self._named_weights())
        self._released: list[tuple[UntypedStorage, int]] = []  # and their bytes

    @classmethod
    def from_hf(cls, architecture: Architecture, hf_path: str, max_tokens: int) -> Self:
        """The model of a Hugging Face folder. Raises ValueError for files that do not match config.json."""
        model = cls(architecture, max_tokens)
        model.load(model.read(hf_path))
        return model

    def _named_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield "model.embed_tokens.weight", self._embedding_VH
        for index, layer in enumerate(self._layers):
            for name, weight in layer.weights():
                yield f"model.layers.{index}.{name}", weight
        yield "model.norm.weight", self._norm_H
        if not self.architecture.tied_embeddings:
            yield "lm_head.weight", self._head_VH

    def read(self, hf_path: str) -> list[tuple[str, Tensor]]:
        """This model's tensors in a folder, mapped into memory. Raises ValueError if one is missing."""
        reader = HfReader(hf_path)
        missing = sorted(self.weights.keys() - set(reader.names()))
        if missing:
            raise UserError(f"{hf_path}: {', '.join(missing[:3])} missing; does config.json belong to these weights?")
        return [(name, reader.read(name)) for name in self.weights]

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies the values into the weights. Unknown names are ignored, as in SGLang.

        Raises ValueError for a wrong shape before anything is changed.
        """
        known = [(self.weights[name], tensor, name) for name, tensor in tensors if name in self.weights]
        for weight, tensor, name in known:
            if weight.shape != tensor.shape:
                raise UserError(f"{name}: shape {tuple(tensor.shape)} does not match the model's {tuple(weight.shape)}")
        for weight, tensor, _ in known:
            weight.copy_(tensor)

    def release(self) -> None:
        """Frees the memory of the weights until `resume`."""
        blocks = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in self.weights.values()}
        self._released = [(block, block.nbytes()) for block in blocks.values()]
        for block, _ in self._released:
            block.resize_(0)

    def resume(self) -> None:
        """Allocates the memory of the weights again. They are NaN until `load`, so that a weight that is not sent
        cannot pass for the right one."""
        for block, num_bytes in self._released:
            block.resize_(num_bytes)
        self._released = []
        for weight in self.weights.values():
            weight.fill_(torch.nan)

    def checksums(self) -> dict[str, str]:
        """16 hexadecimal digits of each tensor's SHA-256."""
        # of copies: torch does not free memory that numpy has seen
        copies = ((name, weight.clone(memory_format=torch.contiguous_format)) for name, weight in self.weights.items())
        return {name: hashlib.sha256(copy.numpy().data).hexdigest()[:16] for name, copy in copies}

    def step(self, token: int, cache: KeyValueCache) -> Tensor:
        """The last layer's output [H] for `token`, which follows the tokens in the cache and is added to it."""
        hidden_H, position = self._embedding_VH[token], cache.num_tokens
        size, epsilon = hidden_H.shape, self.architecture.norm_epsilon
        rotation = self._cosines[position], self._sines[position]
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            normed_H = functional.rms_norm(hidden_H, size, layer.attention_norm_H, epsilon)
            hidden_H = hidden_H + layer.attention(normed_H, layer_cache, position, *rotation)
            normed_H = functional.rms_norm(hidden_H, size, layer.feed_forward_norm_H, epsilon)
            hidden_H = hidden_H + layer.feed_forward(normed_H, cache.routes_K)
        cache.num_tokens += 1
        return hidden_H

    def logits(self, hidden_H: Tensor) -> Tensor:
        """The logits [V] of the next token."""
        normed_H = functional.rms_norm(hidden_H, hidden_H.shape, self._norm_H, self.architecture.norm_epsilon)
        return self._head_VH @ normed_H


def _rotations(model: Architecture, max_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """Cosines and sines [rotated dimensions] by position; the sines have the signs of rotate_half, so that a roll can
    replace it."""
    angles = torch.arange(max_tokens, dtype=torch.float).unsqueeze(1) * inverse_frequencies(model)
    factor = 1.0 if model.rope_scaling is None else model.rope_scaling.attention_factor
    cosines, sines = angles.cos() * factor, angles.sin() * factor
    return list(torch.cat((cosines, cosines), 1)), list(torch.cat((-sines, sines), 1))
