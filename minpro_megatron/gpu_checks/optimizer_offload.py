"""The optimizer in host memory against that on the device: the same updates, and the bytes that it saves."""

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from minpro_megatron.config.run import RunConfig
from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, copies_of_weights, make_policy, update_error
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.planning.memory import state_bytes

LEARNING_RATE, UPDATES = 1e-3, 2


@dataclass(frozen=True)
class Shapes(Slice):
    pass


# The two optimizers round float32 differently in the last bit, and then a few bfloat16 weights.
_LIMITS = (Limit("update_error", at_most=0.02), Limit("grad_norm_error", at_most=0.01))
FULL = (
    Shapes(layers=1, tokens=8192, sequence_tokens=4096, row_tokens=8192, experts=64, vocabulary=32768),
    (*_LIMITS, Limit("saved_bytes_over_plan", at_least=0.9, at_most=1.1)),
)
SMALL = (
    Shapes(layers=1, tokens=128, sequence_tokens=64, row_tokens=128, divisor=32, vocabulary=300),
    (*_LIMITS, Limit("saved_bytes_over_plan", at_least=0.9, at_most=1.1)),
)


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...], meter: Meter | None = None) -> Outcome:
    """Two updates of each, from the same weights with the same mini-batch."""
    meter = meter or Meter(mesh.device)
    config, architecture = _in_bfloat16(shapes.config(mesh.device.type)), shapes.architecture()
    found: dict[float, dict[str, Any]] = {}
    figures: dict[str, Figure] = {}
    error = None
    for fraction in (0.0, 1.0):
        before = meter.held_bytes()
        policy = make_policy(mesh, _with_offload(config, fraction), architecture)
        start, sequences = copies_of_weights(policy), shapes.sequences()
        norms = [policy.update(sequences, LEARNING_RATE).grad_norm for _ in range(UPDATES)]
        seconds = meter.seconds(partial(policy.update, sequences, 0.0))
        after = meter.held_bytes()
        figures["on_host_update_s" if fraction else "on_device_update_s"] = seconds
        held = None if after is None or before is None else after - before - sum(one.nbytes for one in start)
        if found:
            error = update_error(policy, start, [one.to(mesh.device) for one in found[0.0]["weights"]])
        weights = [one.cpu() for one in copies_of_weights(policy)]
        found[fraction] = {"norms": norms, "held": held, "weights": weights}
        del policy, start
        gc.collect()  # Megatron's optimizers are in reference cycles
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()
    on_device, on_host = found[0.0], found[1.0]
    norm_errors = [abs(one / other - 1) for one, other in zip(on_host["norms"], on_device["norms"], strict=True)]
    planned = state_bytes(config, architecture, stage=0)[2]
    saved = None if on_host["held"] is None else on_device["held"] - on_host["held"]
    figures |= {
        "update_error": error,
        "grad_norm_error": max(norm_errors),
        "saved_bytes": saved,
        "planned_saved_bytes": planned,
        "saved_bytes_over_plan": None if saved is None else saved / planned,
    }
    return judged(figures, limits)


# Copies of settings are not validated: RunConfig refuses both on a CPU, where the tests run this check.


def _in_bfloat16(config: RunConfig) -> RunConfig:
    """Megatron moves the float32 copies of bfloat16 weights; float32 weights have none."""
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})


def _with_offload(config: RunConfig, fraction: float) -> RunConfig:
    optimizer = config.optimizer.model_copy(update={"cpu_offload": fraction})
    return config.model_copy(update={"optimizer": optimizer})
