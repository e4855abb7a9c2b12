"""Snapshots of the weights in host memory, and a checkpoint that is written in the background."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.gpu_checks.outcome import Figure, Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import (
    Slice,
    copies_of_weights,
    count_different,
    make_policy,
    update_error,
)
from minpro_megatron.parallel.mesh import Mesh

LEARNING_RATE = 1e-3  # bfloat16 weights of 0.02 move


@dataclass(frozen=True)
class Shapes(Slice):
    """The checkpoint has 14 bytes for each parameter: 6 GB at full width with 64 experts."""


# Kernels that add in no fixed order may change the last bits of an update.
_LIMITS = (
    Limit("weights_changed_by_update", at_least=1),
    Limit("snapshot_weights_different", at_most=0),
    Limit("current_weights_different", at_most=0),
    Limit("loaded_weights_different", at_most=0),
    Limit("loaded_updates_error", at_most=0),
    Limit("next_update_error", at_most=0.05),
)
FULL = (
    Shapes(layers=1, tokens=8192, sequence_tokens=4096, row_tokens=8192, experts=64, vocabulary=32768),
    (*_LIMITS, Limit("snapshot_gb_per_s", at_least=5), Limit("share_of_save_that_blocks", at_most=0.5)),
)
SMALL = (
    Shapes(layers=1, tokens=128, sequence_tokens=64, row_tokens=128, divisor=32, vocabulary=300),
    _LIMITS,
)


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...], meter: Meter | None = None) -> Outcome:
    """Weights are compared bit by bit; the update after loading with the same update after saving."""
    meter = meter or Meter(mesh.device)
    policy = make_policy(mesh, shapes.config(mesh.device.type), shapes.architecture())
    sequences = shapes.sequences()
    figures: dict[str, Figure] = {}

    first = copies_of_weights(policy)
    policy.take_snapshot("first")  # allocates its host memory
    seconds = meter.seconds(lambda: policy.take_snapshot("first"))
    figures["snapshot_gb_per_s"] = sum(weight.nbytes for weight in first) / seconds / 1e9
    policy.update(sequences, LEARNING_RATE)
    second = copies_of_weights(policy)
    figures["weights_changed_by_update"] = count_different(policy, first)
    start = time.perf_counter()
    with policy.use_snapshot("first"):
        figures["snapshot_weights_different"] = count_different(policy, first)
        policy.score(sequences)
    figures["swap_and_score_s"] = time.perf_counter() - start
    figures["current_weights_different"] = count_different(policy, second)

    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    start = time.perf_counter()
    write = policy.save(folder, in_background=True)
    figures["save_blocks_s"] = time.perf_counter() - start
    policy.update(sequences, LEARNING_RATE)  # while it is written
    third = copies_of_weights(policy)
    write.is_done(wait=True)
    files = write.complete()
    figures["save_s"] = time.perf_counter() - start
    figures["share_of_save_that_blocks"] = float(figures["save_blocks_s"]) / float(figures["save_s"])  # type: ignore[arg-type]
    figures["checkpoint_files"] = len(files)
    figures["checkpoint_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    figures["loaded_updates_error"] = abs(policy.load(folder) - 1)
    figures["loaded_weights_different"] = count_different(policy, second)
    policy.update(sequences, LEARNING_RATE)
    figures["next_update_error"] = update_error(policy, second, third)
    return judged(figures, limits)
