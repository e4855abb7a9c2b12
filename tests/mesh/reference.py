"""A training step with Hugging Face transformers, plain autograd and torch AdamW: what every mesh must reproduce."""

import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from minpro_megatron.batching.collate import TokenSequence

COMMON = {
    "vocab_size": 77,  # not a multiple of anything: the padding columns must stay out of the softmax
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def make_model(kind: str) -> PreTrainedModel:
    """A small Qwen3-MoE ("moe") or dense Qwen3 ("dense", "tied": embedding and output layer are one), with weights
    large enough that attention and routing matter."""
    torch.manual_seed(0)
    if kind == "moe":
        experts = {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "moe_intermediate_size": 16,
        }
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, intermediate_size=64, **experts))
    else:
        tied = {"tie_word_embeddings": kind == "tied"}
        model = Qwen3ForCausalLM(Qwen3Config(**{**COMMON, **tied}, intermediate_size=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if "norm" in name else parameter * 5)
    return model


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
    """log pi of the response tokens given everything before them, from the whole logits. [response tokens]"""
    ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()
    logits = model(ids[None]).logits[0].float() / temperature
    first = len(sequence.prompt_ids)
    log_probs = logits.log_softmax(-1)[first - 1 : -1]
    return log_probs.gather(1, ids[first:, None])[:, 0]


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


@dataclass(frozen=True)
class ReferenceStep:
    loss: float
    grad_norm: float
    updated: dict[str, Tensor]


def reference_step(
    model: PreTrainedModel,
    sequences: list[TokenSequence],
    temperature: float,
    learning_rate: float,
    clip: float,
    aggregation: str,
) -> ReferenceStep:
    """One AdamW update of `model` with the paper's weight decay, on every parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    losses, counts = [], []
    for sequence in sequences:
        log_probs = response_log_probs(model, sequence, temperature)
        behavior, mask = torch.from_numpy(sequence.behavior_log_probs), torch.from_numpy(sequence.loss_mask)
        losses.append(minpro_token_losses(log_probs, behavior, mask, sequence.advantage).sum())
        counts.append(float(sequence.loss_mask.sum()))
    token_mean = torch.stack(losses).sum() / sum(counts)
    sequence_mean = (torch.stack(losses) / torch.tensor(counts)).mean()
    loss = token_mean if aggregation == "token_mean" else sequence_mean
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return ReferenceStep(loss.item(), float(grad_norm), saved_tensors(model))


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's tensors under the names of its files: in memory transformers fuses the experts of a layer."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")
