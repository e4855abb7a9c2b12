"""Host memory that saving and loading a checkpoint takes on each rank, in addition to the rank's own state.

    python -m benchmarks.checkpoint_memory [--data 2 4 8] [--million 40]

Trains nothing: a dense bfloat16 model of random weights with its optimizer on gloo ranks of one data-parallel group.
Measured in turn: a save as in the trainer, in the background and at once, and a load; and the same with megatron's
own "fully_reshardable" states, which a data-parallel group gathers on its first rank. Memory is the proportional set
size of the rank and of the processes that it forks, sampled continuously, or the kernel's peak of the rank if larger.
"""

import argparse
import ctypes
import gc
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from minpro_megatron.config.run import parse_run_config
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh

SAMPLE_S = 0.02
GATHERED = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class Measured:
    """One rank's bytes: what it owns (weights, float32 weights and moments of its range), and the maximum of additional
    memory."""

    states: int
    growth: dict[str, int]


def architecture(millions: float) -> Architecture:
    hidden, vocabulary = 512, 8192
    in_layer = hidden * hidden * 3 + 3 * hidden * 4 * hidden  # about: attention with half as many keys, feed-forward
    return Architecture(
        name="Qwen3ForCausalLM",
        num_layers=max(1, round((millions * 1e6 - 2 * vocabulary * hidden) / in_layer)),
        hidden_size=hidden,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=64,
        ffn_hidden_size=4 * hidden,
        num_experts=0,
        num_experts_per_token=0,
        expert_ffn_hidden_size=0,
        vocab_size=vocabulary,
        rope_theta=1e4,
        norm_epsilon=1e-6,
        tied_embeddings=False,
    )


def make_policy(mesh: Mesh, a: Architecture, data: int) -> Any:
    from minpro_megatron.actor.model import build_model
    from minpro_megatron.actor.policy import Policy

    config = parse_run_config(
        {
            "name": "checkpoint-memory",
            "device": "cpu",
            "model": {"hf_path": "unused", "megatron_path": "unused", "dtype": "float32"},  # what the CPU allows
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "parallel": {"data": data},
        }
    )
    chunks = build_model(a, mesh, torch.bfloat16)
    with torch.no_grad():
        for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
            parameter.normal_(0, 0.02)
    return Policy(config, a, chunks, mesh)


class Growth:
    """The growth of memory inside the block; `bytes` is set after it."""

    def __enter__(self) -> "Growth":
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts again from here
        self._process, self._stop = psutil.Process(), threading.Event()
        self._resident, self._before = _status("VmRSS"), self._tree()
        self._largest = self._before
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._largest - self._before, _status("VmHWM") - self._resident)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._largest = max(self._largest, self._tree())

    def _tree(self) -> int:
        return sum(_proportional(one.pid) for one in (self._process, *self._process.children(recursive=True)))


def _proportional(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):  # it has just ended
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def measure(mesh: Mesh, a: Architecture, data: int, root: str) -> Measured:
    policy = make_policy(mesh, a, data)
    growth = {}

    def grown(what: str, act: Callable[[Path], None], name: str) -> None:
        folder = Path(root, name)
        if mesh.rank == 0:
            folder.mkdir(exist_ok=True)
        dist.barrier()
        with Growth() as found:
            act(folder)
            dist.barrier()
        growth[what] = found.bytes

    def save(in_background: bool, folder: Path) -> None:
        write = policy.save(folder, in_background)
        write.is_done(wait=True)
        write.complete()

    save(False, _made(mesh, Path(root, "first")))  # makes the moments
    grown("saved in the background", lambda folder: save(True, folder), "background")
    grown("saved at once", lambda folder: save(False, folder), "at-once")
    grown("loaded", policy.load, "at-once")
    grown("gathered: saved", lambda folder: save_gathered(policy, folder, mesh), "gathered")
    grown("gathered: loaded", lambda folder: load_gathered(policy, folder, mesh), "gathered")
    return Measured(owned_bytes(policy), growth)


def _made(mesh: Mesh, folder: Path) -> Path:
    if mesh.rank == 0:
        folder.mkdir()
    dist.barrier()
    return folder


def owned_bytes(policy: Any) -> int:
    """bfloat16 weights, float32 weights and two moments of the elements that this rank updates."""
    optimizers = getattr(policy._optimizer, "chained_optimizers", [policy._optimizer])
    groups = [group for one in optimizers for group in one.optimizer.param_groups]
    return sum((2 + 12) * parameter.numel() for group in groups for parameter in group["params"])


def gathered_state(policy: Any, mesh: Mesh, is_loading: bool) -> dict[str, Any]:
    metadata = {"dp_cp_group": mesh.groups.dp_cp} | GATHERED
    state = {"model": policy.modules[0].sharded_state_dict(metadata=metadata)}
    one = policy._optimizer.chained_optimizers[0]
    optimizer = one.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state | ({} if optimizer["param_state"] is None else {"optimizer": optimizer["param_state"]})


def save_gathered(policy: Any, folder: Path, mesh: Mesh) -> None:
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(gathered_state(policy, mesh, is_loading=False), str(folder))


def load_gathered(policy: Any, folder: Path, mesh: Mesh) -> None:
    from megatron.core import dist_checkpointing

    with torch.no_grad():
        loaded: Any = dist_checkpointing.load(gathered_state(policy, mesh, is_loading=True), str(folder))
        policy.modules[0].load_state_dict(loaded["model"])
        one = policy._optimizer.chained_optimizers[0]
        restore = one._set_main_param_and_optimizer_states
        # torch's step count is no tensor of the checkpoint
        one._set_main_param_and_optimizer_states = lambda parameter, tensors: restore(
            parameter, {"step": None, **tensors}
        )
        sharding = {"param_state_sharding_type": GATHERED["distrib_optim_sharding_type"]}
        one.load_state_dict(one.state_dict() | {"param_state": loaded["optimizer"]} | sharding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, nargs="+", default=[2, 4, 8], help="data-parallel degrees")
    parser.add_argument("--million", type=float, default=40, help="parameters of the model")
    options = parser.parse_args()
    a = architecture(options.million)
    table = Table(box=MARKDOWN)
    for column in ("data", "own states MB", "", "most MB", "of own states", "of the group's"):
        table.add_column(column, justify="left" if column == "" else "right")
    for data in options.data:
        with tempfile.TemporaryDirectory() as root:
            ranks = run_mesh(measure, a, data, root, deadline_s=900, data=data)
        group = sum(rank.states for rank in ranks)
        for what in ranks[0].growth:
            worst = max(ranks, key=lambda rank, what=what: rank.growth[what] / rank.states)
            most = worst.growth[what]
            sizes = (f"{worst.states / 1e6:.0f}", what, f"{most / 1e6:.0f}")
            table.add_row(str(data), *sizes, f"{most / worst.states:.2f}", f"{most / group:.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
