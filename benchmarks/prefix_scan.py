"""The prefix minimum over context-parallel shards: exchanging piece totals compared with gathering whole sequences.

    python -m benchmarks.prefix_scan [--tokens 20000] [--repetitions 200] [--json FILE]

Both are run by the same gloo ranks on the same rows, call by call in turns, and must agree exactly. Time is the
median wall time of a call on the slowest rank; bytes are what a rank receives from the others.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from minpro_megatron.batching.shards import chunk_halves, context_shard, row_multiple, sequence_multiple
from minpro_megatron.objective.across_ranks.sharded_scan import ShardedScan
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh

WARM_UP = 20
COLUMNS = ("scan", "gather")


def row_lengths(tokens: int, num_sequences: int, context_size: int) -> list[int]:
    """Padded lengths of a row of about `tokens` tokens in `num_sequences` equal sequences."""
    multiple = sequence_multiple(context_size)
    length = -(-tokens // num_sequences // multiple) * multiple
    lengths = [length] * num_sequences
    lengths[-1] += -sum(lengths) % row_multiple(context_size, 1)
    return lengths


def measure(mesh: Mesh, lengths: list[int], repetitions: int) -> dict[str, float]:
    """Median seconds per call, by name, and received bytes, on this rank."""
    context = mesh.context
    held = [context_shard(lengths, context.size(), rank) for rank in range(context.size())]
    mine = torch.from_numpy(held[context.rank()])
    sequence = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    mask = torch.from_numpy((np.random.default_rng(0).random(len(sequence)) > 0.2).astype(np.float32))
    values = torch.from_numpy(np.random.default_rng(1).normal(0, 0.3, len(sequence)).astype(np.float32))
    local, half = values[mine], torch.from_numpy(chunk_halves(lengths, context.size()))
    first = torch.full((1,), torch.inf)
    order = torch.argsort(torch.from_numpy(np.concatenate(held)))  # from rank order to the row's own

    def scan() -> Tensor:
        sharded = ShardedScan(
            sequence[mine],
            half,
            mask[mine],
            num_sequences=len(lengths),
            group=mesh.tensor_and_context,
            tensor_size=1,
        )
        return sharded.exclusive(local, "min")

    def gather() -> Tensor:
        whole = local.new_empty(len(sequence))
        dist.all_gather_single(whole, local, group=context)
        whole = torch.where(mask > 0, whole[order], torch.inf)
        scans = [torch.cat([first, one[:-1].cummin(0).values]) for one in whole.split(lengths)]
        return torch.cat(scans)[mine]

    assert torch.equal(scan(), gather())
    seconds = _in_turns({"scan": scan, "gather": gather}, repetitions)
    others = context.size() - 1
    return seconds | {"scan_bytes": others * 2 * len(lengths) * 4, "gather_bytes": others * len(local) * 4}


def _in_turns(calls: dict[str, Callable[[], Tensor]], repetitions: int) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(WARM_UP + repetitions):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            if repetition >= WARM_UP:
                spent[name].append(time.perf_counter() - start)
    return {name: statistics.median(of) for name, of in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    table = Table("context", "rows of", "scan ms", "gather ms", "ratio", "scan B", "gather B", "ratio")
    found = []
    for context in (2, 4, 8):
        for num_sequences in (1, 16):
            lengths = row_lengths(arguments.tokens, num_sequences, context)
            ranks = run_mesh(measure, lengths, arguments.repetitions, context=context, deadline_s=300)
            worst = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
            found.append({"context": context, "sequences": num_sequences, "tokens": sum(lengths)} | worst)
            times, sizes = [1e3 * worst[of] for of in COLUMNS], [worst[f"{of}_bytes"] for of in COLUMNS]
            table.add_row(
                *(str(number) for number in (context, num_sequences)),
                *(f"{number:.2f}" for number in (*times, times[0] / times[1])),
                *(f"{number:.0f}" for number in sizes),
                f"1/{sizes[1] / sizes[0]:.0f}",
            )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
