"""The list of the checks, in the order of risk retired per second. This file imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minpro_megatron.command_line import did_you_mean
from minpro_megatron.errors import UserError

BUDGET_S = 480.0  # of all checks together, without those of Transformer Engine
# Of each process, before its check begins: torch, Megatron-Core and the CUDA context. An estimate.
START_S = 15.0


@dataclass(frozen=True)
class Check:
    """A check: `module` of this folder has a function `check`, and the shapes and limits FULL and SMALL.

    `expected_s` is an estimate for one H200, from sizes and data-sheet rates; after `limit_s` the process is ended.
    """

    name: str
    question: str
    module: str
    expected_s: float
    limit_s: float
    on_mesh: bool = False  # the first argument is a Mesh of one rank, not a device
    transformer_engine: bool = False  # only where the package is installed
    needs_gpu: bool = False  # without one it is skipped
    options: Mapping[str, Any] = field(default_factory=dict)  # replace fields of the shapes


def _slice(recompute: str, expected_s: float, limit_s: float, transformer_engine: bool = False) -> Check:
    backend = "transformer_engine" if transformer_engine else "torch"
    return Check(
        f"{'te_' if transformer_engine else ''}slice_{recompute}",
        f"four full-width layers of Qwen3-30B-A3B, {backend} layers, recompute = {recompute}: start gate, memory "
        "against the plan, seconds, waits of the host",
        "model_slice",
        expected_s,
        limit_s,
        on_mesh=True,
        transformer_engine=transformer_engine,
        options={"recompute": recompute, "backend": backend},
    )


def _te(name: str, question: str, module: str, expected_s: float, limit_s: float) -> Check:
    return Check(f"te_{name}", question, module, expected_s, limit_s, on_mesh=True, transformer_engine=True)


CHECKS = (
    Check(
        "log_probs",
        "the log-prob kernel at V = 151,936: values and gradients, milliseconds, bytes, share of the matrix rate",
        "log_probs",
        expected_s=40,
        limit_s=100,
    ),
    Check(
        "grouped_products",
        "grouped products of 128 experts, some without tokens, against Megatron's loop",
        "grouped_products",
        expected_s=25,
        limit_s=60,
        on_mesh=True,
    ),
    Check(
        "attention",
        "torch's attention in packed rows, causal and with the masks of context ranks: values, gradients, bytes",
        "attention",
        expected_s=25,
        limit_s=60,
    ),
    _slice("none", expected_s=45, limit_s=90),
    Check(
        "routing_replay",
        "updates and scores follow the recorded experts, also where layers are recomputed",
        "routing_replay",
        expected_s=30,
        limit_s=60,
        on_mesh=True,
    ),
    Check(
        "abort",
        "the group of trainer and servers is closed while a broadcast waits for a member that is silent",
        "abort",
        expected_s=30,
        limit_s=60,
    ),
    Check(
        "snapshots",
        "snapshots of weights, and a checkpoint written in the background while training continues",
        "snapshots",
        expected_s=50,
        limit_s=100,
        on_mesh=True,
    ),
    Check(
        "parked_memory",
        "the policy's memory moves to pinned host memory and back: the same bits, bytes for other processes, the rate",
        "parked_memory",
        expected_s=40,
        limit_s=80,
        on_mesh=True,
    ),
    Check(
        "shared_memory",
        "a bucket of weights goes through shared memory to a server's place on the GPU: the same bits, the rates",
        "shared_memory",
        expected_s=20,
        limit_s=60,
    ),
    Check(
        "optimizer_offload",
        "the optimizer in host memory: the same updates, and the bytes that the plan says it saves",
        "optimizer_offload",
        expected_s=40,
        limit_s=80,
        on_mesh=True,
        needs_gpu=True,
    ),
    _slice("selective", expected_s=40, limit_s=80),
    _slice("full", expected_s=40, limit_s=80),
    _te("attention", "which attention kernels Transformer Engine chooses", "transformer_engine_attention", 35, 80),
    _te("agreement", "Transformer Engine's layers against torch's", "transformer_engine_agreement", 45, 90),
    _slice("none", expected_s=45, limit_s=90, transformer_engine=True),
    _te("sequence_counts", "what a new number of sequences in a row costs", "transformer_engine_counts", 50, 120),
    _te("fusions", "Megatron's fusions on and off: the same results, and what they save", "fusions", 70, 120),
    _te("resume", "Transformer Engine's optimizer continues from a checkpoint", "transformer_engine_resume", 45, 90),
)
BY_NAME = {check.name: check for check in CHECKS}


def selected(names: list[str]) -> list[Check]:
    """The checks of these names in the order of the list; all of them without names. Raises UserError."""
    if unknown := [name for name in names if name not in BY_NAME]:
        hint = did_you_mean(unknown[0], BY_NAME)
        raise UserError(f"--only {unknown[0]}: there is no such check{hint}; known: {', '.join(BY_NAME)}")
    return [check for check in CHECKS if not names or check.name in names]
