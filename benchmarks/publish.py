"""Publishing to a real SGLang server compared with a gloo broadcast of the same bytes; effects on requests in flight.

    python -m benchmarks.publish [--layers 4] [--repeats 5] [--bucket-mb 32 128 512] [--split tensor] [--folder DIR]
        [--transports broadcast shared_memory]

Makes a Qwen3-MoE (hidden size 1024, 64 experts of width 192, float32) of random weights, starts a server with it on
the CPU, and two trainer ranks, which hold it whole (`--split data`) or in halves (`--split tensor`). In turns, for
each bucket size: a publication to the server by each transport, and after each one broadcasts of the same buckets from
rank 0 to rank 1 out of and into memory that is there already. Then publications under streamed responses, for each
pause mode.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import requests
import torch
import torch.distributed as dist
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.records import PublishLease, ServerAddress
from minpro_megatron.serving.server_process import ServerProcess, stop_servers
from minpro_megatron.weights.table import entries
from tests.mesh.harness import run_mesh

MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 192,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 16384,
    "max_position_embeddings": 4096,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
TRANSPORTS = ("broadcast", "shared_memory")
PAUSE_MODES = ("retract", "in_place", "abort")
NUM_STREAMS = 2


def make_model(folder: Path, num_layers: int) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL | {"num_hidden_layers": num_layers}))
    random = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=random) * 0.02
        for entry in entries(read_architecture(folder))
        for name, shape in zip(entry.hf, entry.shapes, strict=True)
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def make_config(root: Path, split: str, bucket_bytes: int, **publish: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "publish",
            "runs_dir": str(root / "runs"),
            "device": "cpu",
            "model": {"hf_path": str(root / "hf"), "megatron_path": "unused", "dtype": "float32"},
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "parallel": {split: 2},
            "sampling": {"max_prompt_tokens": 8, "max_response_tokens": 2000},
            "batch": {"max_tokens_per_row": 2048},
            "server": {"device": "cpu", "dtype": "float32", "max_total_tokens": 8192, "start_timeout_s": 300},
            "publish": {"bucket_bytes": bucket_bytes} | publish,
        }
    )


class Stream:
    """A streamed response of the server: when each of its tokens came."""

    def __init__(self, server: ServerAddress) -> None:
        self.arrivals: list[float] = []
        self._url = server.url
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        parameters = {"max_new_tokens": 1900, "temperature": 1.0, "ignore_eos": True}
        body = {"input_ids": [5, 6, 7], "sampling_params": parameters, "stream": True}
        with requests.post(f"{self._url}/generate", json=body, stream=True, timeout=600) as response:
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    self.arrivals.append(time.monotonic())

    def wait_for(self, num_tokens: int) -> None:
        while len(self.arrivals) < num_tokens:
            time.sleep(0.01)

    def gaps(self, start: float, end: float) -> list[float]:
        return [after - before for before, after in pairwise(self.arrivals) if after > start and before < end]


class Rank:
    """A trainer rank that publishes the same weights, slightly changed, again and again."""

    def __init__(self, mesh: Mesh, root: Path, split: str, server: ServerAddress) -> None:
        from minpro_megatron.publishing.gather import WeightGatherer
        from tests.mesh.steps import loaded_model

        self._mesh, self._root, self._split, self._server = mesh, root, split, server
        architecture, chunks = loaded_model(mesh, str(root / "hf"))
        self.parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self.gatherer = WeightGatherer(chunks, architecture, mesh)
        self._version = 0

    def publisher(self, bucket_bytes: int, **publish: str) -> Any:
        from minpro_megatron.publishing.publish import Publisher

        config = make_config(self._root, self._split, bucket_bytes, **publish)
        return Publisher(config, self.gatherer, self._mesh, score_canaries=None)  # type: ignore[arg-type]  never asked

    def publish(self, publisher: Any, requests_in_flight: bool = False) -> Any:
        with torch.no_grad():
            self.parameters[-1].mul_(1.001)
        self._version += 1
        lease = PublishLease(
            version=self._version,
            servers=[self._server],
            evaluations=[],
            requests_in_flight=requests_in_flight,
        )
        dist.barrier()
        return publisher.publish(lease if self._mesh.rank == 0 else None, changed=True)

    def gather_s(self, bucket_bytes: int) -> float:
        """The time to collect all buckets on rank 0 without sending them."""
        dist.barrier()
        start = time.monotonic()
        for _ in self.gatherer.buckets(bucket_bytes):
            pass
        return time.monotonic() - start


def bare_broadcast_s(sizes: Sequence[int], mesh: Mesh) -> float:
    """From rank 0 to rank 1, buckets of these sizes, until rank 1 has the last."""
    memory = torch.ones(max(sizes), dtype=torch.uint8)
    dist.barrier()
    start = time.monotonic()
    for size in sizes:
        dist.broadcast(memory[:size], src=0, group=mesh.control)
    dist.barrier()
    return time.monotonic() - start


def measure(
    mesh: Mesh, root: Path, split: str, server: ServerAddress, transports: list[str], buckets: list[int], repeats: int
) -> list[dict]:
    """A row for every measurement, on rank 0."""
    rank, rows = Rank(mesh, root, split, server), []
    kinds = [(bucket_bytes, transport) for bucket_bytes in buckets for transport in transports]
    publishers = [(*kind, rank.publisher(kind[0], transport=kind[1])) for kind in kinds]
    for repeat in range(-1, repeats):  # the first round connects, and touches all memory once
        for bucket_bytes, transport, publisher in publishers:
            gathered = rank.gatherer.buckets(bucket_bytes)
            sizes = mesh.from_rank_0([sum(tensor.nbytes for _, tensor in bucket) for bucket in gathered])
            row: dict[str, Any] = {"bucket_bytes": bucket_bytes, "transport": transport, "repeat": repeat}
            row |= {"num_buckets": len(sizes), "num_bytes": sum(sizes)}
            report = rank.publish(publisher)
            row |= {"bare_s": bare_broadcast_s(sizes, mesh), "gather_s": rank.gather_s(bucket_bytes)}
            if report:
                assert (report.held_by, report.transport) == ([0], transport), report.failures
                row |= {"transfer_s": report.transfer_s, "total_s": report.total_s, "load": os.getloadavg()[0]}
            if repeat >= 0:
                rows.append(row)
    return rows


def measure_pauses(mesh: Mesh, root: Path, split: str, server: ServerAddress, bucket_bytes: int) -> list[dict]:
    rank, rows = Rank(mesh, root, split, server), []
    rank._version = 1_000_000
    for mode in PAUSE_MODES:
        publisher = rank.publisher(bucket_bytes, pause_mode=mode)
        rank.publish(publisher)
        streams = [Stream(server) for _ in range(NUM_STREAMS)] if mesh.rank == 0 else []
        for stream in streams:
            stream.wait_for(40)
        start = time.monotonic()
        report = rank.publish(publisher, requests_in_flight=True)
        end = time.monotonic()
        if report:
            before = [gap for stream in streams for gap in stream.gaps(start - 3, start)]
            time.sleep(2)
            gaps = [gap for stream in streams for gap in stream.gaps(start, end)]
            row = {
                "mode": mode,
                "paused_s": report.paused_s,
                "transfer_s": report.transfer_s,
                "total_s": report.total_s,
            }
            rows.append(row | {"gap_s": statistics.median(before), "longest_gap_s": max(gaps, default=0.0)})
            requests.post(f"{server.url}/abort_request", json={"abort_all": True}, timeout=60)
        dist.barrier()
    return rows


def show(rows: list[dict], pauses: list[dict], split: str) -> None:
    console = Console(width=130)
    loads = [row["load"] for row in rows]
    console.print(f"{rows[0]['num_bytes'] / 1e6:.0f} MB, split {split}, load {min(loads):.1f} to {max(loads):.1f}")
    names = ("bucket MB", "transport", "bare MB/s", "publish MB/s", "of bare", "of broadcast", "transfer s", "all s")
    table = Table(*names, box=MARKDOWN)
    for bucket_bytes, transport in dict.fromkeys((row["bucket_bytes"], row["transport"]) for row in rows):
        own = [row for row in rows if (row["bucket_bytes"], row["transport"]) == (bucket_bytes, transport)]
        middle = {name: statistics.median(row[name] for row in own) for name in own[0] if name != "transport"}
        rates = [middle["num_bytes"] / 1e6 / middle[name] for name in ("bare_s", "transfer_s")]
        shares = sorted(row["bare_s"] / row["transfer_s"] for row in own)
        others = {row["repeat"]: row for row in rows
                  if (row["bucket_bytes"], row["transport"]) == (bucket_bytes, "broadcast")}  # fmt: skip
        faster = sorted(others[row["repeat"]]["transfer_s"] / row["transfer_s"] for row in own if others)
        table.add_row(
            f"{bucket_bytes / 1e6:.0f}", transport, f"{rates[0]:.0f}", f"{rates[1]:.0f}", _middle(shares),
            _middle(faster) if transport != "broadcast" and faster else "", f"{middle['transfer_s']:.2f}",
            f"{middle['total_s']:.2f}",
        )  # fmt: skip
    console.print(table)
    table = Table("pause", "median gap s", "longest gap s", "paused s", "transfer s", "all s", box=MARKDOWN)
    for row in pauses:
        cells = (row[name] for name in ("gap_s", "longest_gap_s", "paused_s", "transfer_s", "total_s"))
        table.add_row(row["mode"], *(f"{cell:.2f}" for cell in cells))
    console.print(table)


def _middle(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mb", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--transports", choices=TRANSPORTS, nargs="+", default=list(TRANSPORTS))
    parser.add_argument("--split", choices=("data", "tensor"), default="data")
    parser.add_argument("--folder", type=Path, help="make the files below this folder (default: the temporary one)")
    parser.add_argument("--json", type=Path, help="write all measurements here too")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    buckets = [mb << 20 for mb in arguments.bucket_mb]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        root = Path(name)
        make_model(root / "hf", arguments.layers)
        server = ServerProcess(make_config(root, arguments.split, buckets[0]), 0)
        server.start()
        try:
            server.wait_until_ready(300)
            where = (root, arguments.split, server.address)
            mesh = {arguments.split: 2, "deadline_s": 1500.0}
            rows = run_mesh(measure, *where, arguments.transports, buckets, arguments.repeats, **mesh)[0]
            pauses = run_mesh(measure_pauses, *where, buckets[0], **mesh)[0]
        finally:
            stop_servers([server])
    show(rows, pauses, arguments.split)
    if arguments.json:
        arguments.json.write_text(json.dumps({"transfers": rows, "pauses": pauses}, indent=2) + "\n")


if __name__ == "__main__":
    main()
