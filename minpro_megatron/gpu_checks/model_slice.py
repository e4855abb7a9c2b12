"""A few full-width layers: the start gate, memory against the plan, seconds of an update, waits of the host."""

from contextlib import nullcontext
from dataclasses import dataclass

from minpro_megatron.actor.flops import training_flops
from minpro_megatron.actor.model import DTYPES
from minpro_megatron.actor.policy import Policy
from minpro_megatron.actor.updates import Updates
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import RunFailed
from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, make_policy, with_behavior
from minpro_megatron.metrics.metric import values
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.planning.activations import Row
from minpro_megatron.planning.memory import RankMemory, rank_memory

LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Shapes(Slice):
    rounds: int = 3


# Rehearsed ranks differ from the plan by at most 5 % (tests/integration/rehearsal/test_rehearsal.py); the allocator
# rounds sizes up. The host has to wait once for each layer and row, in forward and in a recomputed forward, because
# Megatron's dispatcher reads the numbers of tokens of the experts; torch's layers read the lengths of each row, and an
# update its statistics and the gradient's norm. More than four for each layer and row would be something else.
_PLAN = (
    Limit("state_bytes_over_plan", at_least=0.95, at_most=1.05),
    Limit("activation_bytes_over_plan", at_least=0.85, at_most=1.1),
)
FULL = (
    Shapes(layers=4, tokens=32768, sequence_tokens=8192, row_tokens=16384),
    (*_PLAN, Limit("host_waits_per_layer_and_row", at_most=4)),
)
SMALL = (
    Shapes(layers=2, tokens=256, sequence_tokens=64, row_tokens=128, divisor=32, vocabulary=300, rounds=1),
    (*_PLAN, Limit("host_waits_per_layer_and_row", at_most=4)),
)


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...], meter: Meter | None = None) -> Outcome:
    """The start gate is that of a run (actor/start_gate.py): what it refuses is a problem. `*_over_plan` are measured
    bytes over those of the planner, without its allowances for the context and for fragments."""
    meter = meter or Meter(mesh.device)
    config, architecture = shapes.config(mesh.device.type), shapes.architecture()
    before = meter.held_bytes()
    policy = make_policy(mesh, config, architecture)
    sequences = shapes.sequences()
    figures: dict[str, Figure] = {}
    problems = _start(policy, config, mesh, shapes, figures)
    if "start_rms" not in figures:
        return Outcome(figures, problems)
    held = meter.held_bytes()
    plan = _plan(config, shapes)
    peak = meter.peak_bytes(lambda: policy.accumulate_gradient(sequences))
    figures |= {
        "state_bytes": None if held is None or before is None else held - before,
        "planned_state_bytes": plan.states,
        "activation_bytes": peak,
        "planned_activation_bytes": plan.activations.peak,
    }
    for name in ("state", "activation"):
        found, planned = figures[f"{name}_bytes"], figures[f"planned_{name}_bytes"]
        figures[f"{name}_bytes_over_plan"] = None if found is None else float(found) / float(planned or 1)
    waits = meter.host_waits(lambda: policy.update(sequences, LEARNING_RATE))
    figures["host_waits"] = waits
    figures["host_waits_per_layer_and_row"] = None if waits is None else waits / _layer_passes(shapes)
    update_s = meter.median_seconds(lambda: policy.update(sequences, LEARNING_RATE), shapes.rounds)
    rate = meter.product_rate(DTYPES[config.model.dtype])
    flops = sum(training_flops(architecture, sequence.num_tokens) for sequence in sequences)
    figures |= {
        "update_s": update_s,
        "tokens_per_s": sum(sequence.num_tokens for sequence in sequences) / update_s,
        "model_tflops": flops / update_s / 1e12,
        "share_of_product_rate": flops / update_s / rate,
    }
    return judged(figures, limits, problems)


def _start(policy: Policy, config: RunConfig, mesh: Mesh, shapes: Shapes, figures: dict[str, Figure]) -> list[str]:
    """Scores the mini-batch and makes the first update of a run on it. Returns what its start gate refuses."""
    sequences = shapes.sequences()
    scored = with_behavior(sequences, policy.score(sequences))
    try:
        trained = Updates(config, mesh, policy).run_step(0, [scored], None, lambda name: nullcontext())
    except RunFailed as error:
        return [f"start gate: {problem}" for problem in error.problems]
    metrics = values(trained.metrics)
    figures["start_rms"] = metrics["ratio/log_second_moment"] ** 0.5
    figures["grad_norm"] = metrics["optimizer/grad_norm"]
    return [] if trained.changed or not config.optimizer.learning_rate else ["the first update changed no weight"]


def _plan(config: RunConfig, shapes: Shapes) -> RankMemory:
    row = Row(shapes.row_tokens, shapes.sequence_tokens)
    rows = -(-shapes.tokens // shapes.row_tokens)
    return rank_memory(config, shapes.architecture(), row, rows, stage=0, imbalance=1.0)


def _layer_passes(shapes: Shapes) -> int:
    """How many times a layer computes the forward of a row in an update."""
    passes = 2 if shapes.recompute == "full" else 1
    return shapes.layers * -(-shapes.tokens // shapes.row_tokens) * passes
