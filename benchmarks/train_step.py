"""One optimizer update of a few full-width Qwen3-30B-A3B layers: tokens/s, and the share of the measured matmul rate.

    python -m benchmarks.train_step [--layers 4] [--tokens 32768] [--backend auto] [--recompute none] [--rounds 5]
    python -m benchmarks.train_step --device cpu --shrink 16 --tokens 512     # checks that the benchmark itself works

One rank, random weights, one mini-batch of equal sequences packed into rows: forward, backward, AdamW. The rate of a
large matrix product in the same dtype is measured in the same rounds. Without a GPU the first form says so and ends.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np
import torch

from minpro_megatron.actor.flops import forward_flops
from minpro_megatron.actor.model import DTYPES, ModelFeatures, build_model
from minpro_megatron.actor.policy import Policy
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.models.known_models.find import find_architecture
from minpro_megatron.parallel.mesh import Mesh, open_mesh

PROMPT_TOKENS = 64
PRODUCT_SIZE = {"cuda": 8192, "cpu": 512}


def shrunk(architecture: Architecture, layers: int, divisor: int) -> Architecture:
    """`layers` layers, the widths divided by `divisor`."""
    return replace(
        architecture,
        num_layers=layers,
        hidden_size=architecture.hidden_size // divisor,
        head_dim=max(16, architecture.head_dim // divisor),
        num_experts=max(8, architecture.num_experts // divisor),
        expert_ffn_hidden_size=architecture.expert_ffn_hidden_size // divisor,
        vocab_size=architecture.vocab_size // divisor,
    )


def run_config(options: argparse.Namespace) -> RunConfig:
    longest = options.sequence_tokens
    return parse_run_config(
        {
            "name": "train-step",
            "device": options.device,
            "model": {
                "hf_path": "unused",
                "megatron_path": "unused",
                "dtype": "bfloat16" if options.device == "cuda" else "float32",
                "backend": options.backend,
                "recompute": options.recompute,
            },
            "data": {"train_file": "unused", "heldout_file": "unused"},
            "sampling": {"max_prompt_tokens": PROMPT_TOKENS, "max_response_tokens": longest - PROMPT_TOKENS},
            "batch": {"max_tokens_per_row": max(longest, options.row_tokens)},
        }
    )


def sequences(num_tokens: int, length: int, vocab_size: int) -> list[TokenSequence]:
    random = np.random.default_rng(0)
    found = []
    for index in range(num_tokens // length):
        response = length - PROMPT_TOKENS
        found.append(
            TokenSequence(
                prompt_ids=random.integers(0, vocab_size, PROMPT_TOKENS, dtype=np.int32),
                response_ids=random.integers(0, vocab_size, response, dtype=np.int32),
                loss_mask=np.ones(response, np.float32),
                behavior_log_probs=np.full(response, -np.log(vocab_size), np.float32),
                rollout_log_probs=np.full(response, -np.log(vocab_size), np.float32),
                advantage=1.0 if index % 2 else -1.0,
                first_slot=index * response,
            )
        )
    return found


@torch.no_grad()
def fill_randomly(chunks: list[Any]) -> None:
    for name, parameter in (pair for chunk in chunks for pair in chunk.named_parameters()):
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0, 0.02)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def measure(mesh: Mesh, options: argparse.Namespace) -> None:
    config = run_config(options)
    architecture = shrunk(find_architecture("Qwen/Qwen3-30B-A3B"), options.layers, options.shrink)
    dtype = DTYPES[config.model.dtype]
    chunks = build_model(architecture, mesh, dtype, ModelFeatures(config.model.recompute, backend=config.model.backend))
    fill_randomly(chunks)
    policy = Policy(config, architecture, chunks, mesh)
    mini_batch = sequences(options.tokens, options.sequence_tokens, architecture.vocab_size)
    num_tokens = sum(sequence.num_tokens for sequence in mini_batch)
    cost = forward_flops(architecture)
    flops = 3 * sum(cost.of(sequence.num_tokens) for sequence in mini_batch)  # backward costs twice the forward
    size = PRODUCT_SIZE[options.device]
    factor = torch.randn(size, size, dtype=dtype, device=mesh.device)
    policy.update(mini_batch, 1e-6)  # compiles, allocates
    steps, products = [], []
    for _ in range(options.rounds):
        products.append(seconds(lambda: factor @ factor, mesh.device))
        steps.append(seconds(lambda: policy.update(mini_batch, 1e-6), mesh.device))
    step_s, rate = statistics.median(steps), 2 * size**3 / statistics.median(products)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in ("torch", "megatron-core"))
    print(f"{name}; {versions}; backend {config.model.backend}, recompute {config.model.recompute}, {dtype}")
    print(f"{options.layers} layers, {len(mini_batch)} sequences of {options.sequence_tokens} tokens")
    print("| tokens/s | s an update | model TFLOP/s | measured matmul TFLOP/s | share |")
    print("|---|---|---|---|---|")
    tflops = flops / step_s / 1e12
    print(
        f"| {num_tokens / step_s:,.0f} | {step_s:.3f} | {tflops:.3g} | {rate / 1e12:.3g} | {tflops * 1e12 / rate:.2f} |"
    )
    if options.device == "cuda":
        print(f"\npeak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


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
    options = parser.parse_args(arguments)
    options.sequence_tokens = min(options.sequence_tokens, options.tokens)
    return options


def main() -> None:
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no GPU; full-width layers in bfloat16 say nothing on a CPU")
        return
    config = run_config(options)
    where = "tcp://127.0.0.1:0"
    with open_mesh(config.parallel, options.device, seed=0, init_method=where, rank=0, world_size=1) as mesh:
        measure(mesh, options)


if __name__ == "__main__":
    main()
