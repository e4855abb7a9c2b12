"""Convert between Hugging Face checkpoints (safetensors) and Megatron distributed checkpoints, or plan the memory.

    minpro convert to-megatron --hf DIR --output DIR [--dtype bfloat16] [--verify]
    minpro convert to-hf --megatron DIR --output DIR [--hf-reference DIR] [--verify]
    minpro convert dequantize --hf DIR --output DIR
    minpro convert plan --hf DIR --parallel tensor=4,pipeline=2,expert=8,context=2 [--json]
    minpro convert plan --hf DIR --parallel pipeline=4,pipeline_layers=11+13+13+11

Conversion runs in one process on the CPU, in about a gigabyte of memory whatever the model's size, and changes no bit
unless --dtype is given. The output appears under its name only when complete, and loads on any mesh. Weights are read
from safetensors only. The Megatron folder of `to-hf` is an output of this tool or a run's checkpoint
(runs/NAME/checkpoints/step-N); config and tokenizer of the latter are those of the run's model.hf_path. From a Megatron
folder's pickles only metadata classes and plain data are unpickled. `plan` needs only config.json. `dequantize` writes
a release in float8 with a scale for each block of a weight (DeepSeek's form, also Qwen3's) as a Hugging Face folder in
bfloat16, which servers load; convert it with `to-megatron` for the trainer.
"""

import argparse
from pathlib import Path

from minpro_megatron.command_line import command_parser, make_console
from minpro_megatron.config.mesh_option import FLAGS as MESH_FLAGS
from minpro_megatron.config.mesh_option import add_parallel, parallel_config
from minpro_megatron.config.options import naming
from minpro_megatron.errors import run_reporting

FLAGS = {"model.hf_path": "--hf"} | MESH_FLAGS


def parse_arguments(arguments: list[str] | None, prog: str) -> argparse.Namespace:
    parser = command_parser(__doc__, prog)
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
    plain = commands.add_parser("dequantize", help="float8 with scales of blocks -> bfloat16, both Hugging Face")
    plain.add_argument("--hf", type=Path, required=True, help="folder with config.json and safetensors")
    for command in (into, back, plain):
        command.add_argument(
            "--output",
            type=Path,
            required=True,
            metavar="DIR",
            help="a new folder, or an earlier output of this command",
        )
    for command in (into, back):
        command.add_argument("--verify", action="store_true", help="compare the result with its source, bit by bit")
    plan = commands.add_parser("plan", help="parameters and bytes of each rank")
    plan.add_argument("--hf", type=Path, required=True, help="folder with config.json")
    add_parallel(plan)
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None, prog: str = "minpro convert") -> int:
    """0, or 2 after a message about a wrong option or model; `plan` also ends with 2 if tensors are missing."""
    options = parse_arguments(arguments, prog)

    def run() -> int:
        with naming(FLAGS):
            return _run(options)

    return run_reporting(run)


def _run(options: argparse.Namespace) -> int:
    import torch  # after the arguments: it takes seconds

    torch.set_num_threads(1)  # bytes are copied, nothing is computed
    if options.command == "plan":
        return _plan(options)
    from minpro_megatron.conversion.convert import to_hf, to_megatron
    from minpro_megatron.conversion.dequantize import dequantize
    from minpro_megatron.models.text_files import other_files
    from minpro_megatron.monitor.byte_progress import byte_progress

    if options.command == "to-megatron":
        cast_to = getattr(torch, options.dtype) if options.dtype else None
        layers = to_megatron(options.hf, options.output, byte_progress, options.verify, cast_to)
        if layers:
            print(
                f"not converted: {len(layers)} tensors such as {layers[0]}, of the layer that predicts later tokens "
                "for speculative decoding, which is not trained"
            )
        if left_out := other_files(options.hf):
            print(f"not copied, because they are neither weights nor part of the tokenizer: {', '.join(left_out)}")
    elif options.command == "dequantize":
        dequantize(options.hf, options.output, byte_progress)
    else:
        to_hf(options.megatron, options.output, byte_progress, options.hf_reference, options.verify)
    print(f"wrote {options.output}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from minpro_megatron.conversion.memory_table import print_plan
    from minpro_megatron.weights.plan import make_plan

    plan = make_plan(options.hf, parallel_config(options.parallel))
    print(plan.as_json()) if options.json else print_plan(make_console(), plan)
    return 0 if not plan.hf_tensors_missed + plan.hf_tensors_absent else 2
