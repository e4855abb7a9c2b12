"""What the checks train: a few layers of Qwen3-30B-A3B with random weights, and random sequences."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from minpro_megatron.actor.model import DTYPES, build_model, features_of
from minpro_megatron.actor.policy import Policy
from minpro_megatron.actor.routing import Routes
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.models.known_models.find import find_architecture
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.weights.local import global_parameters

MODEL = "Qwen/Qwen3-30B-A3B"


@dataclass(frozen=True)
class Slice:
    """`layers` layers of the model with the widths divided by `divisor`, and a mini-batch of `tokens` tokens in equal
    sequences. `experts` and `vocabulary` replace the model's; 0 keeps them."""

    layers: int
    tokens: int
    sequence_tokens: int
    row_tokens: int
    divisor: int = 1
    experts: int = 0
    vocabulary: int = 0
    backend: str = "torch"
    recompute: str = "none"
    routing_replay: bool = False

    def architecture(self) -> Architecture:
        """Qwen3-30B-A3B's, cut to this size."""
        whole = find_architecture(MODEL)
        return replace(
            whole,
            num_layers=self.layers,
            hidden_size=whole.hidden_size // self.divisor,
            head_dim=max(16, whole.head_dim // self.divisor),
            num_experts=self.experts or max(8, whole.num_experts // self.divisor),
            expert_ffn_hidden_size=whole.expert_ffn_hidden_size // self.divisor,
            vocab_size=self.vocabulary or whole.vocab_size // self.divisor,
        )

    def config(self, device: str, **megatron: Any) -> RunConfig:
        """The settings of a run that trains it; `megatron` is model.megatron."""
        prompt = self.prompt_tokens
        config = parse_run_config(
            {
                "name": "gpu-check",
                "device": device,
                "model": {
                    "hf_path": "unused",
                    "megatron_path": "unused",
                    "dtype": "bfloat16" if device == "cuda" else "float32",
                    "backend": self.backend if device == "cuda" else "auto",
                    "recompute": self.recompute,
                    "routing_replay": "scored" if self.routing_replay else "none",
                    "megatron": megatron,
                },
                "data": {"train_file": "unused", "heldout_file": "unused"},
                "sampling": {"max_prompt_tokens": prompt, "max_response_tokens": self.sequence_tokens - prompt},
                "batch": {"max_tokens_per_row": max(self.sequence_tokens, self.row_tokens)},
                # a run with scored routes has none
                "checkpoint": {"every_steps": 0, "every_minutes": 0},
                "alarms": {"stop_on": []},
            }
        )
        # a copy is not validated: Transformer Engine's layers are refused on a CPU, where tests have a stand-in for it
        return config.model_copy(update={"model": config.model.model_copy(update={"backend": self.backend})})

    @property
    def prompt_tokens(self) -> int:
        return min(64, self.sequence_tokens // 4)

    def sequences(self) -> list[TokenSequence]:
        """Random tokens; positive and negative advantages."""
        random, vocabulary = np.random.default_rng(0), self.architecture().vocab_size
        response = self.sequence_tokens - self.prompt_tokens
        unknown = np.full(response, -np.log(vocabulary), np.float32)
        return [
            TokenSequence(
                prompt_ids=random.integers(0, vocabulary, self.prompt_tokens, dtype=np.int32),
                response_ids=random.integers(0, vocabulary, response, dtype=np.int32),
                loss_mask=np.ones(response, np.float32),
                behavior_log_probs=unknown,
                rollout_log_probs=unknown,
                advantage=1.0 if index % 2 else -1.0,
                first_slot=index * response,
            )
            for index in range(self.tokens // self.sequence_tokens)
        ]


def make_policy(mesh: Mesh, config: RunConfig, architecture: Architecture) -> Policy:
    """A policy with random weights, the same ones at every call."""
    chunks = build_model(architecture, mesh, DTYPES[config.model.dtype], features_of(config))
    fill_randomly(chunks)
    return Policy(config, architecture, chunks, mesh)


@torch.no_grad()
def fill_randomly(chunks: list[Any], seed: int = 0) -> None:
    """Norms get ones; every matrix gets normal numbers, with which its products keep the size of their inputs."""
    random: torch.Generator | None = None
    for name, parameter in (pair for chunk in chunks for pair in chunk.named_parameters()):
        random = random or torch.Generator(parameter.device).manual_seed(seed)
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=random)


def with_behavior(sequences: list[TokenSequence], log_probs: np.ndarray) -> list[TokenSequence]:
    """The sequences with the behavior log-probs `log_probs` [all response tokens]."""
    ends = np.cumsum([len(sequence.response_ids) for sequence in sequences])
    parts = np.split(log_probs, ends[:-1])
    return [replace(one, behavior_log_probs=part) for one, part in zip(sequences, parts, strict=True)]


def accumulated_gradient(
    policy: Policy, architecture: Architecture, mesh: Mesh, sequences: list[TokenSequence], routes: Routes
) -> dict[str, torch.Tensor]:
    """The float32 gradient of the mini-batch before clipping, by the parameters' global names, which are the same for
    all layer backends. The tensors are Megatron's own: the next pass overwrites them.

    With `routes` every pass uses the same experts. A router with almost equal scores for two experts chooses either
    one, and the gradient of an expert with a few tokens more or less differs by up to 60 % (bfloat16 on a CPU).
    """
    policy.accumulate_gradient(sequences, routes=routes)
    named: dict[str, Any] = dict(global_parameters(policy.modules, architecture.num_experts, mesh))
    return {name: parameter.main_grad for name, parameter in named.items() if parameter.requires_grad}


def copies_of_weights(policy: Policy) -> list[torch.Tensor]:
    """The policy's parameters now, on its device."""
    return [parameter.detach().clone() for chunk in policy.modules for parameter in chunk.parameters()]


def count_different(policy: Policy, expected: list[torch.Tensor]) -> int:
    """The number of parameters that are not bit by bit `expected`."""
    parameters = [parameter for chunk in policy.modules for parameter in chunk.parameters()]
    assert len(parameters) == len(expected)
    return sum(not torch.equal(one.detach(), other) for one, other in zip(parameters, expected, strict=True))


def update_error(policy: Policy, start: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The norm of (weights - expected) over that of (expected - start), over all parameters."""
    parameters = [parameter.detach() for chunk in policy.modules for parameter in chunk.parameters()]
    difference = sum(_square(one, other) for one, other in zip(parameters, expected, strict=True))
    moved = sum(_square(one, other) for one, other in zip(expected, start, strict=True))
    return (difference / moved) ** 0.5 if moved else float("inf")


def _square(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.float() - other.float()).square().sum(dtype=torch.float64).item()
