"""Convert between Hugging Face checkpoints (safetensors) and Megatron distributed checkpoints.

    python tools/convert_checkpoint.py to-megatron --hf DIR --output DIR
    python tools/convert_checkpoint.py to-hf --megatron DIR --hf-reference DIR --output DIR

One process, on the CPU, whole model in memory. The output appears under its name only when complete.
"""

import argparse
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from torch import Tensor

# Before the imports: megatron-core announces at import every optional package that is not installed.
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

from minpro_megatron.actor.checkpoint import check_manifest, load_weights, save_weights
from minpro_megatron.actor.model import DTYPES, build_model
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.parallel.mesh import Mesh, open_mesh
from minpro_megatron.weights.architecture import read_architecture
from minpro_megatron.weights.gather import WeightGatherer
from minpro_megatron.weights.hf_files import HfReader, dtype_name, write_hf
from minpro_megatron.weights.local import load_hf_tensors


def to_megatron(hf: Path, output: Path) -> None:
    """Write the Megatron checkpoint of the Hugging Face folder `hf` to `output`, in the dtype of its weights."""
    architecture = read_architecture(hf)
    reader = HfReader(hf)
    dtype = reader.read(reader.names()[0]).dtype
    if dtype_name(dtype) not in DTYPES:
        raise ValueError(f"{hf}: weights are {dtype_name(dtype)}; known: {', '.join(DTYPES)}")
    with _one_process_mesh() as mesh, _progress("reading", _weight_bytes(hf)) as announce:

        def read(name: str) -> Tensor:
            tensor = reader.read(name)
            announce(tensor.nbytes)
            return tensor

        chunks = build_model(architecture, mesh, dtype)
        load_hf_tensors(chunks, architecture, mesh, read)
        save_weights(chunks, architecture, output, mesh, source=hf.name)


def to_hf(megatron: Path, reference: Path, output: Path) -> None:
    """Write the Hugging Face folder of the Megatron checkpoint `megatron`; config and tokenizer from `reference`."""
    architecture = read_architecture(reference)
    check_manifest(megatron, architecture)
    reader = HfReader(reference)
    dtype = reader.read(reader.names()[0]).dtype
    with _one_process_mesh() as mesh, _progress("writing", _weight_bytes(reference)) as announce:
        chunks = build_model(architecture, mesh, dtype)
        load_weights(chunks, architecture, megatron, mesh)
        buckets = WeightGatherer(chunks, architecture, mesh).buckets(bucket_bytes=1 << 28)
        write_hf((pair for bucket in buckets for pair in bucket), reference, output, announce=announce)


@contextmanager
def _one_process_mesh() -> Iterator[Mesh]:
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = f"file://{folder}/rendezvous"
        with open_mesh(ParallelConfig(), "cpu", seed=0, init_method=rendezvous, rank=0, world_size=1) as mesh:
            yield mesh


def _weight_bytes(hf: Path) -> int:
    return sum(file.stat().st_size for file in hf.glob("*.safetensors"))


@contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("to-megatron", help="Hugging Face -> Megatron")
    into.add_argument("--hf", type=Path, required=True, help="folder with config.json and safetensors")
    into.add_argument("--output", type=Path, required=True)
    back = commands.add_parser("to-hf", help="Megatron -> Hugging Face")
    back.add_argument("--megatron", type=Path, required=True)
    back.add_argument("--hf-reference", type=Path, required=True, help="folder to take config and tokenizer from")
    back.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        if arguments.command == "to-megatron":
            to_megatron(arguments.hf, arguments.output)
        else:
            to_hf(arguments.megatron, arguments.hf_reference, arguments.output)
    except ValueError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
