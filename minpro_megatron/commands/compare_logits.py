"""Compare a Megatron checkpoint on a mesh with the Hugging Face model from which it was made, logit by logit.

    minpro compare-logits --hf DIR [--megatron DIR] [--parallel tensor=2,pipeline=2] \\
        (--text TEXT | --ids 12,7,40) ... [--dtype bfloat16] [--backend auto] [--json]

Both read the same tokens; without --megatron the mesh loads the Hugging Face weights itself. The output is, over all
positions of all sequences: the largest and the mean difference of logits, how often the highest logit belongs to the
same token, and the mean and largest KL divergence (Hugging Face || Megatron) of the next token, in nats; and whether
the mean divergence is small enough for equal weights (1e-6 in float32, 1e-2 in bfloat16). This command starts the
ranks: on GPUs if there is one for every rank, else on the CPU in float32. Exit status: 0 if the models agree, 1 if
not, 2 if they cannot be compared.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minpro_megatron.command_line import command_parser, make_console
from minpro_megatron.config.mesh_option import FLAGS as MESH_FLAGS
from minpro_megatron.config.mesh_option import add_parallel
from minpro_megatron.config.options import SettingOption, naming
from minpro_megatron.errors import run_reporting

if TYPE_CHECKING:
    from minpro_megatron.model_comparison.comparison import Comparison

DIFFER = 1
OPTIONS = (
    SettingOption("--dtype", "model.dtype", default="bfloat16", default_text="bfloat16 on GPUs, float32 on the CPU"),
    SettingOption("--backend", "model.backend"),
)
FLAGS = {option.setting: option.flag for option in OPTIONS} | {"model.hf_path": "--hf"} | MESH_FLAGS


def main(arguments: list[str] | None = None, prog: str = "minpro compare-logits") -> int:
    """0 if the models agree, 1 if they differ, 2 after a message about a wrong option or model."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--megatron", type=Path, help="converted model, or a run's checkpoint")
    add_parallel(parser)
    parser.add_argument("--text", action="append", default=[], help="a text to compare on; may be repeated")
    parser.add_argument("--ids", action="append", default=[], metavar="ID,ID,...", help="token ids; may be repeated")
    for option in OPTIONS:
        option.add_to(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = vars(parser.parse_args(arguments))
    for option in OPTIONS:
        if given[option.destination] is None:
            given[option.destination] = option.value
    return run_reporting(lambda: _compare(given.pop("json"), given))


def _compare(as_json: bool, given: dict[str, Any]) -> int:
    from minpro_megatron.model_comparison.comparison import ComparisonOptions, run_comparison, to_standard_error

    with naming(FLAGS):
        comparison = run_comparison(ComparisonOptions(**given), to_standard_error)
    if as_json:
        print(json.dumps(asdict(comparison), indent=2))
    else:
        _print(comparison)
    return 0 if comparison.agrees else DIFFER


def _print(comparison: "Comparison") -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from minpro_megatron.model_comparison.comparison import MAX_MEAN_KL

    table = Table(box=SIMPLE, show_header=False)
    for name in ("tokens", "largest_difference", "mean_difference", "top_1_agreement", "mean_kl", "largest_kl"):
        table.add_row(name.replace("_", " "), f"{getattr(comparison, name):.6g}")
    make_console().print(table)
    limit = f"the limit for {comparison.dtype} is a mean KL divergence of {MAX_MEAN_KL[comparison.dtype]:g}"
    print(f"the models agree ({limit})" if comparison.agrees else f"the models differ ({limit})")
