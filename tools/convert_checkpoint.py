"""Convert between Hugging Face checkpoints (safetensors) and Megatron distributed checkpoints, or plan the memory.

    python tools/convert_checkpoint.py to-megatron --hf DIR --output DIR [--dtype bfloat16] [--verify]
    python tools/convert_checkpoint.py to-hf --megatron DIR --output DIR [--hf-reference DIR] [--verify]
    python tools/convert_checkpoint.py plan --hf DIR --parallel tensor=4,pipeline=2,expert=8,context=2 [--json]
    python tools/convert_checkpoint.py plan --hf DIR --parallel pipeline=4,pipeline_layers=11+13+13+11

Conversion runs in one process on the CPU, in about a gigabyte of memory whatever the model's size, and changes no bit
unless --dtype is given. The output appears under its name only when complete, and loads on any mesh. Weights are read
from safetensors only. The Megatron folder of `to-hf` is an output of this tool or a run's checkpoint
(runs/NAME/checkpoints/step-N); config and tokenizer of the latter are those of the run's model.hf_path. From a Megatron
folder's pickles only metadata classes and plain data are unpickled. `plan` needs only config.json.
"""

import argparse
import sys
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from minpro_megatron.command_line import tool_parser
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.conversion.convert import to_hf, to_megatron
from minpro_megatron.errors import UserError, run_reporting
from minpro_megatron.models.text_files import other_files
from minpro_megatron.monitor.byte_progress import byte_progress
from minpro_megatron.weights.plan import Plan, RankKind, make_plan

AXES = tuple(ParallelConfig.model_fields)
DEGREES = tuple(axis for axis in AXES if axis not in ("data", "pipeline_layers"))


def parse_parallel(text: str) -> ParallelConfig:
    """ "tensor=4,pipeline=2" as a mesh. Raises UserError naming the axis that is unknown, repeated or wrong."""
    degrees: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        axis, _, degree = part.partition("=")
        if not degree or axis in degrees:
            raise UserError(f"--parallel: {part!r} must be axis=degree, each axis once; known: {', '.join(AXES)}")
        degrees[axis] = degree
    try:
        return ParallelConfig.model_validate(degrees)
    except ValidationError as error:
        first = error.errors()[0]
        field = f"{'.'.join(map(str, first['loc']))} = {first['input']}: " if first["loc"] else ""
        raise UserError(f"--parallel: {field}{first['msg']}; known axes: {', '.join(AXES)}") from None


def print_plan(plan: Plan) -> None:
    console, mesh = Console(), plan.parallel
    degrees = ", ".join(f"{axis} {getattr(mesh, axis)}" for axis in DEGREES if getattr(mesh, axis) > 1)
    experts = f" (of experts by {plan.expert_optimizer_ranks})" if plan.architecture.num_experts else ""
    console.print(
        f"{plan.architecture.name}, {plan.parameters:,} parameters: {plan.hf_tensors_covered:,} tensors covered, "
        f"{len(plan.hf_tensors_missed):,} missed, {len(plan.hf_tensors_absent):,} absent",
        f"{mesh.world_size} ranks: {degrees or 'no cut'}, data {mesh.data_size}; "
        f"optimizer states cut by {plan.optimizer_ranks}{experts}",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    columns = ("stage", "ranks", "layers", "parameters", "weights", "gradients", "optimizer", "total")
    table = Table(*columns, box=SIMPLE, padding=(0, 0, 0, 1), title="each rank of a pipeline stage")
    for column in table.columns[1:]:
        column.justify = "right"
    for kind in plan.rank_kinds:
        table.add_row(*_cells(kind))
    console.print(table)


def _cells(kind: RankKind) -> list[str]:
    first, last = kind.stages[0], kind.stages[-1]
    sizes = (kind.weight_bytes, kind.gradient_bytes, kind.optimizer_bytes, kind.total_bytes)
    return [
        str(first) if first == last else f"{first}-{last}",
        str(kind.num_ranks),
        str(kind.layers),
        f"{kind.parameters:,}",
        *map(decimal, sizes),
    ]


def parse_arguments() -> argparse.Namespace:
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    into = commands.add_parser("to-megatron", help="Hugging Face -> Megatron")
    into.add_argument("--hf", type=Path, required=True, help="folder with config.json and safetensors")
    into.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="round every tensor to this dtype: for folders with tensors of several (float32 routers) or of float16",
    )
    back = commands.add_parser("to-hf", help="Megatron -> Hugging Face")
    back.add_argument("--megatron", type=Path, required=True, help="converted model, or a run's checkpoint")
    back.add_argument("--hf-reference", type=Path, help="take config, tokenizer and file names from this model folder")
    for command in (into, back):
        command.add_argument("--output", type=Path, required=True)
        command.add_argument("--verify", action="store_true", help="compare the result with its source, bit by bit")
    plan = commands.add_parser("plan", help="parameters and bytes of each rank")
    plan.add_argument("--hf", type=Path, required=True, help="folder with config.json")
    plan.add_argument(
        "--parallel",
        default="",
        help=f"axis=degree,...; axes: {', '.join(AXES)} (layers of each stage, such as pipeline_layers=3+2)",
    )
    plan.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # bytes are copied, nothing is computed
    return run_reporting(lambda: _run(arguments), "convert_checkpoint")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "plan":
        plan = make_plan(arguments.hf, parse_parallel(arguments.parallel))
        print(plan.as_json()) if arguments.json else print_plan(plan)
        return 0 if not plan.hf_tensors_missed + plan.hf_tensors_absent else 2
    if arguments.command == "to-megatron":
        cast_to = getattr(torch, arguments.dtype) if arguments.dtype else None
        to_megatron(arguments.hf, arguments.output, byte_progress, arguments.verify, cast_to)
        if left_out := other_files(arguments.hf):
            print(f"not copied, because they are neither weights nor part of the tokenizer: {', '.join(left_out)}")
    else:
        to_hf(arguments.megatron, arguments.output, byte_progress, arguments.hf_reference, arguments.verify)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
