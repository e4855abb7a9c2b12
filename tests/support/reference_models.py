"""Tiny random models for the reference engine, and its responses computed again one by one."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from minpro_megatron.models.architecture import Architecture
from minpro_megatron.reference_engine.model import KeyValueCache, Model
from minpro_megatron.reference_engine.responses import Response
from minpro_megatron.reference_engine.sampling import Sampler, SamplingParameters

MAX_TOKENS = 600


def architecture(num_experts: int = 4) -> Architecture:
    return Architecture(
        name="Qwen3MoeForCausalLM", num_layers=2, hidden_size=16, num_attention_heads=4, num_query_groups=2,
        head_dim=8, ffn_hidden_size=16, num_experts=num_experts, num_experts_per_token=2, expert_ffn_hidden_size=8,
        vocab_size=32, rope_theta=10000.0, norm_epsilon=1e-6, tied_embeddings=False,
    )  # fmt: skip


def random_tensors(seed: int) -> list[tuple[str, torch.Tensor]]:
    """Logits spread widely enough for different weights to sample different tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (name, torch.randn(weight.shape, generator=generator))
        for name, weight in Model(architecture(), 1).weights.items()
    ]


def random_model(seed: int) -> Model:
    model = Model(architecture(), MAX_TOKENS)
    model.load(random_tensors(seed))
    return model


def response(prompt: list[int], seed: int, num_tokens: int, request_id: str = "", **extra: object) -> Response:
    """Of exactly `num_tokens` tokens."""
    sampling = SamplingParameters(max_new_tokens=num_tokens, sampling_seed=seed, ignore_eos=True)
    return Response(request_id or f"{prompt}-{seed}", prompt, sampling, frozenset(), with_log_probs=True, **extra)  # type: ignore[arg-type]


@contextmanager
def one_thread() -> Iterator[None]:
    """As in the engine. It is also much faster: threads that wait for each other take longer than these models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
@one_thread()
def computed(
    prompt: list[int],
    seed: int,
    num_tokens: int,
    models: list[Model],
    change_at: int | None = None,
    retract: bool = False,
) -> tuple[list[int], list[float]]:
    """Tokens and log-probs with the first model; from token `change_at` on with the second, which starts with the
    first one's keys and values, or with its own after a retraction."""
    sampler = Sampler(SamplingParameters(sampling_seed=seed))
    model, cache = models[0], KeyValueCache(architecture(), MAX_TOKENS)
    tokens, log_probs = list(prompt), []
    while len(log_probs) < num_tokens:
        if len(log_probs) == change_at:
            model = models[1]
            if retract:
                cache = KeyValueCache(architecture(), MAX_TOKENS)
        hidden_H = torch.empty(0)
        while cache.num_tokens < len(tokens):
            hidden_H = model.step(tokens[cache.num_tokens], cache)
        token, log_prob = sampler(model.logits(hidden_H))
        tokens.append(token)
        log_probs.append(log_prob)
    return tokens[len(prompt) :], log_probs


def sampled(answer: dict) -> tuple[list[int], list[float]]:
    """Tokens and log-probs of an answer."""
    return answer["output_ids"], [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]


def spans(answer: dict) -> list[tuple[str, int, int]]:
    return [(span["version"], span["start"], span["end"]) for span in answer["meta_info"]["weight_versions"]]


def float64_probs(logits_V: torch.Tensor, temperature: float) -> np.ndarray:
    values = np.exp(logits_V.double().numpy() / temperature)
    return values / values.sum()
