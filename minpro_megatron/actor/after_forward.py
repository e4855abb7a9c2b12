"""Releases what Megatron's modules hold of a forward pass after it."""

from collections.abc import Sequence
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer

# Attributes of megatron-core 0.19.2's MoEAlltoAllTokenDispatcher that it sets and reads within one forward pass.
_OF_ONE_FORWARD = ("probs", "routing_map", "reversed_local_input_permutation_mapping")


def release_after_forward(chunks: Sequence[GPTModel]) -> None:
    """Makes every mixture-of-experts layer release its dispatcher's tensors, and every model chunk the hidden states
    that it has received from another pipeline stage, when their forward pass has returned.

    Megatron keeps both until the module runs again. With full recomputation the dispatcher's `probs` also keep the
    graph of the recomputed forward pass, and through it the layer's input and the gradient of that input: after every
    update, two hidden states for each layer. A chunk's input has its gradient too, also while other chunks run.
    Backward needs none of them: autograd saves what it needs, and the schedule holds inputs whose gradients it sends.
    """
    for chunk in chunks:
        chunk.register_forward_hook(_release_input)
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                module.register_forward_hook(_release_routes)


def _release_input(chunk: Any, inputs: Any, output: Any) -> None:
    chunk.set_input_tensor(None)


def _release_routes(layer: Any, inputs: Any, output: Any) -> None:
    for name in _OF_ONE_FORWARD:
        setattr(layer.token_dispatcher, name, None)
