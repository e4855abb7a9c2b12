"""One optimizer update of a few full-width Qwen3-30B-A3B layers: tokens/s, and the share of the measured matmul rate.

    python -m benchmarks.train_step [--layers 4] [--tokens 32768] [--backend torch] [--recompute none] [--rounds 5]
    python -m benchmarks.train_step --device cpu --shrink 16 --tokens 512     # checks that the benchmark itself works

The measurement is that of `minpro gpu-check --only slice_none`, at other sizes: one rank, random weights, one
mini-batch of equal sequences packed into rows; forward, backward, AdamW, and memory against the plan. Without a GPU the
first form says so and ends.
"""

import argparse
import json
import tempfile

import torch

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.gpu_checks.model_slice import Shapes, check
from minpro_megatron.parallel.mesh import open_mesh


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32768, help="of the mini-batch")
    parser.add_argument("--sequence-tokens", type=int, default=8192)
    parser.add_argument("--row-tokens", type=int, default=16384, help="longest packed row")
    parser.add_argument("--backend", choices=["auto", "transformer_engine", "torch"], default="auto")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths by this")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


def shapes_of(options: argparse.Namespace) -> Shapes:
    sequence = min(options.sequence_tokens, options.tokens)
    return Shapes(
        layers=options.layers,
        tokens=options.tokens,
        sequence_tokens=sequence,
        row_tokens=max(sequence, options.row_tokens),
        divisor=options.shrink,
        backend=options.backend,
        recompute=options.recompute,
        rounds=options.rounds,
    )


def main() -> None:
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no GPU; full-width layers in bfloat16 say nothing on a CPU")
        return
    shapes = shapes_of(options)
    with tempfile.TemporaryDirectory() as folder:
        place = {"init_method": f"file://{folder}/rendezvous", "rank": 0, "world_size": 1}
        with open_mesh(ParallelConfig(), options.device, seed=0, **place) as mesh:
            outcome = check(mesh, shapes, limits=())
    print(json.dumps(dict(outcome.figures), indent=1))
    for problem in outcome.problems:
        print(problem)


if __name__ == "__main__":
    main()
