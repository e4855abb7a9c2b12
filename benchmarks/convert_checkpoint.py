"""Checkpoint conversion against `cp` of the same files: bytes per second and peak memory.

    python -m benchmarks.convert_checkpoint [--layers 3] [--repeats 3] [--folder DIR]

Makes a Qwen3-MoE with the layers of Qwen3-30B-A3B (hidden size 2048, 128 experts of width 768, bfloat16) but fewer of
them, in files of about 1 GB, and times, one after the other and in turns: `cp -r` of the Hugging Face folder,
to-megatron, `cp -r` of the Megatron folder, to-hf. Each time is a whole command, from its start until its output is on
the disk (fsync). Removes what it made. Needs about five times the model's size on the disk.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.weights.table import entries

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "convert_checkpoint.py"
FILE_BYTES = 1_000_000_000
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


@dataclass(frozen=True)
class Timing:
    cached_s: float  # until the command ended
    on_disk_s: float  # until its output was on the disk
    cpu_s: float  # of its own and the system's, on its behalf
    peak_bytes: int


def make_model(folder: Path, num_layers: int) -> None:
    """Random bits as weights: nothing in conversion depends on the values."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
    shapes = {
        name: shape
        for entry in entries(read_architecture(folder))
        for name, shape in zip(entry.hf, entry.shapes, strict=True)
    }
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if size > FILE_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * torch.Size(shape).numel()
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        bits = {name: torch.randint(-(2**15), 2**15, shape, dtype=torch.int16) for name, shape in shard.items()}
        save_file({name: tensor.view(torch.bfloat16) for name, tensor in bits.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def run(command: list[str], output: Path) -> Timing:
    """The command's times and peak memory; `output` is the folder it makes."""
    shutil.rmtree(output, ignore_errors=True)
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | PATHS)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    cached_s = time.monotonic() - start
    if status:
        raise RuntimeError(f"{' '.join(command)} failed: {said}")
    for path in output.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    cpu_s = usage.ru_utime + usage.ru_stime
    return Timing(cached_s, time.monotonic() - start, cpu_s, usage.ru_maxrss * 1024)


PATHS = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def measure(folder: Path, repeats: int) -> dict[str, list[Timing]]:
    hf, megatron, back, copy = (folder / name for name in ("hf", "megatron", "back", "copy"))
    tool = [sys.executable, str(TOOL)]
    commands = {
        "tool --help": ([*tool, "--help"], copy),
        "cp, HF": (["cp", "-r", str(hf), str(copy)], copy),
        "to-megatron": ([*tool, "to-megatron", "--hf", str(hf), "--output", str(megatron)], megatron),
        "cp, Megatron": (["cp", "-r", str(megatron), str(copy)], copy),
        "to-hf": ([*tool, "to-hf", "--megatron", str(megatron), "--output", str(back)], back),
    }
    timings: dict[str, list[Timing]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, (command, output) in commands.items():
            timings[name].append(run(command, output))
            shutil.rmtree(copy, ignore_errors=True)
    return timings


def medians(found: list[Timing]) -> Timing:
    middle = len(found) // 2
    return Timing(*(sorted(values)[middle] for values in zip(*map(astuple, found), strict=True)))


def show(timings: dict[str, list[Timing]], num_bytes: int) -> None:
    """Rates of a conversion are those of the whole command; the first line shows the share of start-up."""
    console = Console(width=100)
    cores = len(os.sched_getaffinity(0))
    console.print(
        f"{num_bytes / 1e9:.2f} GB of weights; {cores} cores, load {os.getloadavg()[1]:.1f}; medians of "
        f"{len(timings['to-hf'])} rounds, largest peak"
    )
    table = Table("", "s", "GB/s", "of cp", "s until on disk", "of cp", "CPU s", "peak memory", box=MARKDOWN)
    for column in table.columns[1:]:
        column.justify = "right"
    copied = None
    for name, found in timings.items():
        own = medians(found)
        shares = ["", ""]
        if name.startswith("cp"):
            copied = own
        elif copied:
            shares = [f"{copied.cached_s / own.cached_s:.2f}", f"{copied.on_disk_s / own.on_disk_s:.2f}"]
        rate = "" if name.startswith("tool") else f"{num_bytes / 1e9 / own.cached_s:.2f}"
        peak = f"{max(timing.peak_bytes for timing in found) / 1e6:,.0f} MB"
        cells = (f"{own.cached_s:.1f}", rate, shares[0], f"{own.on_disk_s:.1f}", shares[1], f"{own.cpu_s:.1f}", peak)
        table.add_row(name, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="make the files below this folder (default: the temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        # in a process of its own: the commands' peaks would start from this one's
        maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(folder / "hf", arguments.layers))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit("the model was not made")
        timings = measure(folder, arguments.repeats)
        show(timings, folder_bytes(folder / "hf"))


if __name__ == "__main__":
    main()
