"""The policy's memory moves to pinned host memory and back: the same bits, the bytes that others can use, the rate."""

import gc
from dataclasses import dataclass

import torch

from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, copies_of_weights, count_different, make_policy, update_error
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.planning.memory import state_bytes

LEARNING_RATE = 1e-3  # bfloat16 weights of 0.02 move


@dataclass(frozen=True)
class Shapes(Slice):
    """18 bytes for each parameter, 8 GB at full width with 64 experts; 14 of them move."""


# Kernels that add in no fixed order may change the last bits of an update.
_LIMITS = (
    Limit("weights_different", at_most=0),
    Limit("next_update_error", at_most=0.05),
    Limit("moved_bytes_over_plan", at_least=0.98, at_most=1.05),
)
FULL = (
    Shapes(layers=1, tokens=8192, sequence_tokens=4096, row_tokens=8192, experts=64, vocabulary=32768),
    (
        *_LIMITS,
        Limit("left_bytes_over_plan", at_most=0.02),
        Limit("kept_by_allocator_over_plan", at_most=0.05),
        Limit("to_host_gb_per_s", at_least=10),
        Limit("to_device_gb_per_s", at_least=10),
    ),
)
SMALL = (
    Shapes(layers=1, tokens=128, sequence_tokens=64, row_tokens=128, divisor=32, vocabulary=300),
    (*_LIMITS, Limit("left_bytes_over_plan", at_most=0.02), Limit("kept_by_allocator_over_plan", at_most=0.05)),
)


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...], meter: Meter | None = None) -> Outcome:
    """The update after the moves is compared with the same update of a policy that has not moved."""
    meter = meter or Meter(mesh.device)
    config, architecture, sequences = shapes.config(mesh.device.type), shapes.architecture(), shapes.sequences()
    expected = _updated_without_moves(mesh, shapes)
    gc.collect()  # Megatron's optimizers are in reference cycles
    if mesh.device.type == "cuda":
        torch.cuda.empty_cache()
    empty, kept_when_empty = meter.held_bytes(), meter.reserved_bytes()
    policy = make_policy(mesh, config, architecture)
    policy.update(sequences, LEARNING_RATE)
    before = [weight.cpu() for weight in copies_of_weights(policy)]

    policy.to_host()  # allocates its host memory
    policy.to_device()
    to_host_s = meter.seconds(policy.to_host)
    moved, left, kept = policy.parked_bytes, meter.held_bytes(), meter.reserved_bytes()
    to_device_s = meter.seconds(policy.to_device)
    start = [weight.to(mesh.device) for weight in before]
    figures: dict[str, Figure] = {"weights_different": count_different(policy, start)}
    policy.update(sequences, LEARNING_RATE)
    figures["next_update_error"] = update_error(policy, start, [weight.to(mesh.device) for weight in expected])

    weights, gradients, states, _ = state_bytes(config, architecture, stage=0)
    planned = weights + gradients + states
    figures |= {
        "moved_bytes": moved,
        "moved_bytes_over_plan": moved / (weights + states),
        "left_bytes_over_plan": None if left is None or empty is None else (left - empty) / planned,
        "kept_by_allocator_over_plan": (
            None if kept is None or kept_when_empty is None else (kept - kept_when_empty) / planned
        ),
        "to_host_gb_per_s": moved / to_host_s / 1e9,
        "to_device_gb_per_s": moved / to_device_s / 1e9,
    }
    return judged(figures, limits)


def _updated_without_moves(mesh: Mesh, shapes: Shapes) -> list[torch.Tensor]:
    """The weights after two updates, in host memory."""
    policy = make_policy(mesh, shapes.config(mesh.device.type), shapes.architecture())
    for _ in range(2):
        policy.update(shapes.sequences(), LEARNING_RATE)
    return [weight.cpu() for weight in copies_of_weights(policy)]
