"""A tiny mixture with random weights, and what transformers computes with it."""

import functools
from pathlib import Path

import numpy as np
import torch


def save_random_model(folder: Path, seed: int) -> None:
    """A tiny Qwen3-MoE with logits spread widely enough for responses to differ in length."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=128, tie_word_embeddings=False, eos_token_id=1,
        pad_token_id=0, dtype=torch.float32,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(5.0)
    model.save_pretrained(folder)


@functools.cache
def model_of_transformers(folder: Path) -> torch.nn.Module:
    from transformers import Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def log_probs_by_transformers(folder: Path, prompt: list[int], response: np.ndarray, temperature: float) -> np.ndarray:
    model = model_of_transformers(folder)
    tokens = torch.tensor([prompt + response.tolist()])
    with torch.no_grad():
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].double()
    chosen = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response.tolist()).unsqueeze(1))
    return chosen[:, 0].numpy()


def routes_by_transformers(folder: Path, tokens: list[int]) -> np.ndarray:
    """The experts of each token and layer, in order of their numbers: [tokens, layers, experts a token]."""
    model = model_of_transformers(folder)
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(2).indices.sort().values for layer in logits], dim=1).numpy()
