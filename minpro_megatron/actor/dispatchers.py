"""Releases what Megatron's token dispatchers hold of a layer's forward pass."""

from collections.abc import Sequence
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer

# Attributes of megatron-core 0.19.2's MoEAlltoAllTokenDispatcher that it sets and reads within one forward pass.
_OF_ONE_FORWARD = ("probs", "routing_map", "reversed_local_input_permutation_mapping")


def release_after_forward(chunks: Sequence[GPTModel]) -> None:
    """Makes every mixture-of-experts layer release its dispatcher's tensors when its forward pass has returned.

    Megatron keeps them until the layer runs again. With full recomputation `probs` also keeps the graph of the
    recomputed forward pass, and through it the layer's input and the gradient of that input: after every update, two
    hidden states for each layer. Backward does not need the attributes, because autograd saves what it needs.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                module.register_forward_hook(_release)


def _release(layer: Any, inputs: Any, output: Any) -> None:
    for name in _OF_ONE_FORWARD:
        setattr(layer.token_dispatcher, name, None)
