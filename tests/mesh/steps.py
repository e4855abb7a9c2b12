"""A training step on a mesh, and how far it is from the reference."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.ragged_batch import SHORTEST_ROW
from tests.mesh.reference import ReferenceStep

TEMPERATURE, LEARNING_RATE, SURVEY_SEED = 0.8, 1e-3, 5
# Relative to the loss and the norm, to the largest entry of a gradient tensor, and to the update's norm: AdamW turns
# rounding in gradients near zero into whole steps, so its updates are not compared one by one.
MAX_LOSS, MAX_NORM, MAX_GRADIENT, MAX_UPDATE = 1e-5, 1e-5, 1e-5, 1e-3
MAX_REORDERED = 1e-6  # in the loss, between two orders or splits of the same mini-batch on the same mesh


def step_config(
    parallel: dict[str, Any],
    *,
    packing: bool = True,
    row_tokens: int = SHORTEST_ROW,
    **objective: str,
) -> RunConfig:
    return parse_run_config(
        {
            "name": "mesh-test",
            "device": "cpu",
            "model": {"hf_path": "unused", "megatron_path": "unused", "dtype": "float32"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "parallel": parallel,
            "objective": {"name": "minpro"} | objective,
            "sampling": {"temperature": TEMPERATURE, "max_prompt_tokens": 16, "max_response_tokens": row_tokens - 32},
            "optimizer": {"clip_grad": 0.25},  # below the gradient's norm: clipping has something to do
            "batch": {
                "num_prompts": 8,
                "mini_batch_prompts": 8,
                "max_tokens_per_row": row_tokens,
                "packing": packing,
            },
        }
    )


# A mini-batch and how it is laid out: the settings of rows and mesh, and the sequences in some order.
LaidOut = tuple[RunConfig, Sequence[TokenSequence]]


@dataclass(frozen=True)
class MeshStep:
    """What an update on a mesh was. The tensors are rank 0's, under Hugging Face names."""

    loss: float
    grad_norms: list[float]  # as every rank has it, before clipping
    gradients: dict[str, np.ndarray]  # after clipping
    weights: dict[str, np.ndarray]  # after the update


def take_steps(mesh: Mesh, hf_path: str, layouts: Sequence[LaidOut], backend: str = "auto") -> list[MeshStep]:
    """One update of a fresh policy with each of the layouts."""
    from minpro_megatron.metrics.metric import merge
    from tests.mesh.gradients import whole_gradients, whole_tensors

    steps = []
    for config, sequences in layouts:
        architecture, policy = loaded_policy(mesh, config, hf_path, backend)
        result = policy.update(sequences, LEARNING_RATE, SURVEY_SEED)
        loss = merge(mesh.from_all_ranks(result.metrics))["objective/loss"].value
        assert loss is not None
        norms = mesh.from_all_ranks(result.grad_norm)
        gradients = whole_gradients(policy, architecture, mesh)
        steps.append(MeshStep(loss, norms, gradients, whole_tensors(policy, architecture, mesh)))
    return steps


def loaded_policy(mesh: Mesh, config: RunConfig, hf_path: str, backend: str = "auto") -> tuple[Any, Any]:
    """(architecture, a new Policy with the weights of `hf_path`)."""
    from minpro_megatron.actor.policy import Policy

    architecture, chunks = loaded_model(mesh, hf_path, backend)
    return architecture, Policy(config, architecture, chunks, mesh, records_log_probs=True)


def loaded_model(mesh: Mesh, hf_path: str, backend: str = "auto") -> tuple[Any, list]:
    """(architecture, this rank's chunks of a new model with the weights of `hf_path`)."""
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, torch.float32, ModelFeatures(backend=backend))
    load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
    return architecture, chunks


@dataclass(frozen=True)
class Differences:
    """A step from the reference, each relative to what its tolerance says."""

    loss: float
    grad_norm: float
    gradient: float
    worst_tensor: str
    update: float

    def __post_init__(self) -> None:
        numbers = (self.loss, self.grad_norm, self.gradient, self.update)
        assert not np.isnan(numbers).any(), numbers

    @property
    def breaches(self) -> list[str]:
        """A line for everything that is further off than allowed."""
        limits = [
            ("loss", self.loss, MAX_LOSS),
            ("gradient norm", self.grad_norm, MAX_NORM),
            (f"gradient of {self.worst_tensor}", self.gradient, MAX_GRADIENT),
            ("update", self.update, MAX_UPDATE),
        ]
        return [f"{what}: off by {found:.2e}, allowed {limit:.0e}" for what, found, limit in limits if found > limit]


def differences(step: MeshStep, expected: ReferenceStep) -> Differences:
    """Raises AssertionError where a tensor is missing or has another shape."""
    gradient, worst_tensor = _gradient_difference(step, expected)
    return Differences(
        loss=abs(step.loss / expected.loss - 1),
        grad_norm=max(abs(norm / expected.grad_norm - 1) for norm in step.grad_norms),
        gradient=gradient,
        worst_tensor=worst_tensor,
        update=_update_difference(step, expected),
    )


def _gradient_difference(step: MeshStep, expected: ReferenceStep) -> tuple[float, str]:
    """(largest difference of an entry, relative to the largest entry of its tensor; the tensor's name)."""
    assert step.gradients.keys() == expected.gradients.keys()
    by_tensor = {}
    for name, tensor in expected.gradients.items():
        gradient, found = tensor.double().numpy(), step.gradients[name]
        assert found.shape == gradient.shape, name
        difference, largest = np.abs(found - gradient).max(), np.abs(gradient).max()
        # an expert that no token was sent to has no gradient, and must have none
        by_tensor[name] = float(difference / largest) if largest else (float("inf") if difference else 0.0)
    worst = max(by_tensor, key=lambda name: by_tensor[name])
    return by_tensor[worst], worst


def _update_difference(step: MeshStep, expected: ReferenceStep) -> float:
    """The norm of the difference over the norm of the update, over the whole model."""
    assert step.weights.keys() == expected.updated.keys()
    off, moved = 0.0, 0.0
    for name, updated in expected.updated.items():
        assert step.weights[name].shape == tuple(updated.shape), name
        off += float(np.square(step.weights[name] - updated.double().numpy()).sum())
        moved += float((updated - expected.start[name]).double().square().sum())
    return (off / moved) ** 0.5
