"""A training step with Hugging Face transformers, plain autograd and torch AdamW: what every mesh must reproduce."""

import copy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.optimizer import OptimizerConfig
from minpro_megatron.models.architecture import Architecture, parse_architecture

COMMON = {
    "vocab_size": 77,  # not a multiple of anything: the padding columns must stay out of the softmax
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
GLM: dict[str, Any] = {
    "hidden_size": 44,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,  # of which 6 are rotated
    "intermediate_size": 52,
    "attention_bias": True,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
# Other families, in shapes that are odd for every mesh.
FAMILIES: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(
        **{**COMMON, "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10},
        intermediate_size=44,
        architectures=["Qwen2ForCausalLM"],
    ),
    # the pretraining's positions are few, so that both scalings change what the sequences of the tests give
    "llama": LlamaConfig(
        **{
            **COMMON,
            "hidden_size": 30,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 10,
        }
        | {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        intermediate_size=52,
        architectures=["LlamaForCausalLM"],
    ),
    "yarn": Qwen3Config(
        **{**COMMON, "num_key_value_heads": 2, "rope_parameters": YARN},
        intermediate_size=36,
        architectures=["Qwen3ForCausalLM"],
    ),
    "glm": Glm4MoeConfig(**{**COMMON, **GLM}, architectures=["Glm4MoeForCausalLM"]),
    # as GLM-4.5-Air: without norms of queries and keys
    "glm air": Glm4MoeConfig(
        **{**COMMON, **GLM, "num_hidden_layers": 3, "first_k_dense_replace": 2, "use_qk_norm": False},
        architectures=["Glm4MoeForCausalLM"],
    ),
}


def make_model(kind: str) -> PreTrainedModel:
    """A small Qwen3-MoE ("moe"), a dense Qwen3 ("dense", "tied": embedding and output layer are one) or one of
    FAMILIES, with weights large enough that attention and routing matter; "moe of 5", "tied of 3": with so many
    layers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(kind))
    with torch.no_grad():
        for name, parameter in (*model.named_parameters(), *biases_of_choice(model)):
            parameter.copy_(random_values(name, parameter))
    return model


def biases_of_choice(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """What transformers keeps in buffers although files hold it: the biases with which GLM chooses experts."""
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def random_values(name: str, parameter: Tensor) -> Tensor:
    """Values for a parameter that transformers initialized, in which it would leave norms at 1 and biases at 0."""
    if "norm" in name:
        return torch.rand_like(parameter) + 0.5
    return torch.rand_like(parameter) - 0.5 if name.endswith("bias") else parameter * 5


def model_config(kind: str) -> PreTrainedConfig:
    if kind in FAMILIES:
        return copy.deepcopy(FAMILIES[kind])  # saving a model of another type changes it
    kind, _, layers = kind.partition(" of ")
    common = {**COMMON, "num_hidden_layers": int(layers)} if layers else COMMON
    if kind == "moe":
        experts = {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 16,
        }
        return Qwen3MoeConfig(**common, intermediate_size=64, **experts, architectures=["Qwen3MoeForCausalLM"])
    # six layers: pipelines of three and six stages are possible, where the mixture allows two and four
    own = {"tied": {"tie_word_embeddings": True}, "dense": {"num_hidden_layers": 6}}[kind]
    return Qwen3Config(**{**common, **own}, intermediate_size=64, architectures=["Qwen3ForCausalLM"])


def model_architecture(kind: str) -> Architecture:
    return parse_architecture(model_config(kind).to_dict(), kind)


def make_sequences(count: int, longest: int, seed: int = 0) -> list[TokenSequence]:
    """Ragged sequences with masked holes, stale behavior log-probs, positive, negative and zero advantages."""
    random = np.random.default_rng(seed)
    sequences, first_slot = [], 0
    for index in range(count):
        prompt, response = int(random.integers(1, 9)), int(random.integers(1, longest))
        mask = (random.random(response) > 0.2).astype(np.float32)
        mask[random.integers(0, response)] = 1
        sequences.append(
            TokenSequence(
                prompt_ids=random.integers(0, COMMON["vocab_size"], prompt).astype(np.int32),
                response_ids=random.integers(0, COMMON["vocab_size"], response).astype(np.int32),
                loss_mask=mask,
                behavior_log_probs=np.zeros(response, np.float32),
                rollout_log_probs=np.zeros(response, np.float32),
                advantage=[0.8, -1.1, 0.0, 0.3][index % 4],
                first_slot=first_slot,
            )
        )
        first_slot += response
    return sequences


def response_log_probs(model: PreTrainedModel, sequence: TokenSequence, temperature: float) -> Tensor:
    """log pi of the response tokens given everything before them, from the whole logits, or from those of the ids that
    truncated sampling kept. [response tokens]"""
    ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()
    logits = model(ids[None]).logits[0] / temperature
    first = len(sequence.prompt_ids)
    logits = logits[first - 1 : -1]
    if sequence.supports is not None:
        logits = logits.masked_fill(~is_kept(sequence, logits.shape[1]), -torch.inf)
    log_probs = logits.log_softmax(-1)
    return log_probs.gather(1, ids[first:, None])[:, 0]


def is_kept(sequence: TokenSequence, vocabulary: int) -> Tensor:
    """bool [response tokens, vocabulary]: what truncated sampling kept; everything for tokens without kept ids."""
    assert isinstance(sequence.supports, np.ndarray)
    sizes, ids = np.split(sequence.supports, [len(sequence.response_ids)])
    kept = torch.zeros(len(sizes), vocabulary, dtype=torch.bool)
    kept[np.repeat(np.arange(len(sizes)), sizes), ids] = True
    return kept | torch.from_numpy(sizes == 0)[:, None]


def minpro_token_losses(log_probs: Tensor, behavior: Tensor, mask: Tensor, advantage: float) -> Tensor:
    """Written from arXiv:2601.22718, token by token: m_t is the least ratio among the earlier trained tokens."""
    losses = []
    prefix_min = None
    for log_prob, old, trained in zip(log_probs, behavior, mask, strict=True):
        ratio = torch.exp(log_prob.detach() - old)
        weight = torch.clamp((1.0 if prefix_min is None else prefix_min) * ratio, 0.0, 5.0)
        losses.append(-weight * advantage * log_prob * trained)
        if trained > 0:
            prefix_min = ratio if prefix_min is None else torch.minimum(prefix_min, ratio)
    return torch.stack(losses)


# The mini-batch's loss from each sequence's log-probs [response tokens], which carry the gradient.
BatchLoss = Callable[[Sequence[TokenSequence], list[Tensor]], Tensor]


def minpro_loss(aggregation: str) -> BatchLoss:
    """MinPRO over a mini-batch; "sequence_mean" leaves out sequences without a trained token."""

    def loss(sequences: Sequence[TokenSequence], log_probs: list[Tensor]) -> Tensor:
        sums, counts = [], []
        for sequence, own in zip(sequences, log_probs, strict=True):
            behavior, mask = torch.from_numpy(sequence.behavior_log_probs), torch.from_numpy(sequence.loss_mask)
            sums.append(minpro_token_losses(own, behavior, mask, sequence.advantage).sum())
            counts.append(sequence.num_trained_tokens)
        if aggregation == "token_mean":
            return torch.stack(sums).sum() / sum(counts)
        return torch.stack([total / count for total, count in zip(sums, counts, strict=True) if count]).mean()

    return loss


@dataclass(frozen=True)
class ReferenceStep:
    """One update, float64; tensors under the names of the model's files."""

    loss: float
    grad_norm: float  # before clipping
    gradients: dict[str, Tensor]  # after clipping
    start: dict[str, Tensor]
    updated: dict[str, Tensor]


def decayed_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's parameter groups: matrices decay; norms and biases do not, as in Megatron."""
    parameters = list(model.parameters())
    return [
        {"params": [one for one in parameters if one.dim() > 1], "weight_decay": weight_decay},
        {"params": [one for one in parameters if one.dim() == 1], "weight_decay": 0.0},
    ]


def reference_step(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    loss_of: BatchLoss,
    temperature: float,
    learning_rate: float,
    optimizer: OptimizerConfig,
) -> ReferenceStep:
    """What one AdamW update does, which decays matrices only; `model` stays as it is."""
    start = saved_tensors(model)
    with in_float64(model) as wide:
        adam = torch.optim.AdamW(
            decayed_groups(wide, optimizer.weight_decay),
            lr=learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
        )
        loss = loss_of(sequences, [response_log_probs(wide, sequence, temperature) for sequence in sequences])
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(wide.parameters(), optimizer.clip_grad)
        adam.step()
    updated = saved_tensors(wide)
    with torch.no_grad():
        for parameter in wide.parameters():
            assert parameter.grad is not None
            parameter.copy_(parameter.grad)
        for _, bias in biases_of_choice(wide):
            bias.zero_()
    return ReferenceStep(loss.item(), float(grad_norm), saved_tensors(wide), start, updated)


@contextmanager
def in_float64(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A copy of `model` that computes in float64 inside, where transformers would go back to float32 for its norms,
    softmax and router."""
    wide = copy.deepcopy(model).double()
    wide.set_attn_implementation("eager")
    if "Moe" in type(model).__name__:
        wide.set_experts_implementation("eager")  # the grouped product of the default knows no float64
    with mock.patch.object(sys.modules[type(model).__module__], "torch", _WideTorch()):
        yield wide


class _WideTorch:
    """The torch module, in which float32 is float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors under the names of its files: in memory transformers fuses the experts of a layer."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")
