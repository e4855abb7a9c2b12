"""Make a tiny Qwen3-MoE checkpoint in Hugging Face format, warm-started on a calculator task.

    minpro tiny-model --output artifacts/tiny_moe/hf
    minpro tiny-model --task calculator_steps --output artifacts/steps_moe/hf
    minpro tiny-model --task products --output artifacts/products/hf

The model knows most answers (greedy decoding is mostly correct) without giving them reliably (sampling is mostly
wrong), which reinforcement learning can improve: see minpro_megatron/tiny_model/warm_start.py. Products it cannot
compute, but it knows how to call a calculator for them. An earlier output is replaced.
"""

from pathlib import Path
from typing import Any

from minpro_megatron.command_line import command_parser, count, make_console, whole_number
from minpro_megatron.errors import run_reporting

TASKS = ("calculator", "calculator_steps", "products")
DATA_FOLDER = Path(__file__).resolve().parents[1] / "recipes" / "data"


def main(arguments: list[str] | None = None, prog: str = "minpro tiny-model") -> int:
    """0 on success, 2 after a message about an error in the input."""
    parser = command_parser(__doc__, prog)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("--task", choices=TASKS, default=TASKS[0], help=f"the task to learn (default: {TASKS[0]})")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and training (default: 0)")
    parser.add_argument(
        "--steps", type=whole_number, help="warm-start steps; 0 keeps the random weights (default: the task's)"
    )
    parser.add_argument("--hidden-size", type=count, help="a multiple of 8 (default: the task's)")
    parser.add_argument("--layers", type=count, default=2, help="number of layers (default: 2)")
    parser.add_argument(
        "--data", type=Path, default=DATA_FOLDER, help="folder with the task's held-out prompts (default: the demo's)"
    )
    # One thread on every machine: at this size a second one gains little on idle cores and multiplies the CPU time
    # on busy ones; and the order of summation, and so the weights, depends on the number.
    parser.add_argument("--threads", type=count, default=1, help="CPU threads (default: 1)")
    given = vars(parser.parse_args(arguments))
    if given["hidden_size"] is not None and given["hidden_size"] % 8:
        parser.error(f"argument --hidden-size: '{given['hidden_size']}' is not a multiple of 8 (4 heads of even size)")
    return run_reporting(lambda: _make(given.pop("threads"), given), reads_given_files=True)


def _make(threads: int, given: dict[str, Any]) -> int:
    import torch  # after the arguments: it takes seconds
    from transformers.utils import logging as transformers_logging

    from minpro_megatron.tiny_model.warm_start import TinyModelOptions, make_checkpoint

    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    console = make_console()
    measured = make_checkpoint(TinyModelOptions(**given), console)
    print(
        f"held-out accuracy on {measured.num_prompts} prompts: "
        f"sampled {measured.sampled:.3f} ± {measured.sampled_standard_error:.3f}, "
        f"greedy {measured.greedy:.3f} ± {measured.greedy_standard_error:.3f}"
    )
    print(f"wrote {given['output']}")
    return 0
