"""Log-probs and entropies from hidden states, forward and backward: this project's, the naive way, and verl's.

    python -m benchmarks.log_probs [--tokens 2048] [--rounds 5] [--dtype float32] [--device cpu]
    python -m benchmarks.log_probs --blocks 512x512 1024x2048 ... --vocabulary 32768

The first form times all implementations in one process in turns (naive, ours, verl, naive, ...), checks that they
agree, measures the peak memory of each in a process of its own, and prints Markdown tables. Peak memory is what the
agree, measures the peak memory of each in a separate process, and prints Markdown tables. Peak memory is what the
process (on a GPU: the allocator) uses in addition to the inputs and the returned gradients of hidden states and weight.
On a GPU the rate of a bfloat16 matrix product is measured in the same rounds. The second form times this project's at
several block sizes, in turn. A timing waits until other processes stop using the processors, and is repeated if they
used more than --others of them meanwhile. verl's rows appear if verl is installed (benchmarks/README.md).
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from minpro_megatron.gpu_checks.log_prob_ways import (
    TEMPERATURE,
    Problem,
    Way,
    in_chunks,
    make_problem,
    naive,
    of_whole_logits,
    ours,
    verl_torch,
    verl_triton,
)
from minpro_megatron.gpu_checks.meter import Meter
from minpro_megatron.parallel import log_probs as module
from minpro_megatron.parallel.products import cpu_product

MIB = 1 << 20
PATIENCE_S = 1800  # maximum wait for other processes to stop using the processors

Seconds = tuple[float, float]  # forward, backward


class _OneDnnLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TH, weight_VH)
        return cpu_product(hidden_TH, weight_VH.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TH, weight_VH = ctx.saved_tensors
        d_logits = gradients[0]
        return cpu_product(d_logits, weight_VH), cpu_product(d_logits.t(), hidden_TH)


def naive_with_our_product(problem: Problem) -> tuple[Tensor, Tensor]:
    """Shows the benefit of the blocks separately from that of the faster matrix product on a CPU."""
    return of_whole_logits(cast(Tensor, _OneDnnLogits.apply(problem.hidden_TH, problem.weight_VH)), problem.labels_T)


def implementations(device: str, dtype: torch.dtype) -> dict[str, Way]:
    """By name, in the order of the table; verl's where it is installed."""
    found: dict[str, Way] = {"naive": naive, "ours": ours, "chunks of tokens": in_chunks}
    if device == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        found["naive, oneDNN product"] = naive_with_our_product
    if util.find_spec("verl") is None:
        print("verl is not installed: its rows are skipped", file=sys.stderr)
    else:
        found["verl, torch"] = verl_torch
        if device == "cuda":
            found["verl, Triton"] = verl_triton
    return found


def seconds(problem: Problem, implementation: Way) -> tuple[float, float, tuple[Tensor, ...]]:
    """(forward seconds, backward seconds, (log-probs, entropies, d hidden)); frees the weight's gradient."""
    problem.hidden_TH.grad = problem.weight_VH.grad = None
    start = _now(problem)
    log_probs, entropies = implementation(problem)
    middle = _now(problem)
    (log_probs * problem.upstream_T).sum().backward()
    end = _now(problem)
    d_hidden = problem.hidden_TH.grad
    assert d_hidden is not None
    assert problem.weight_VH.grad is not None
    problem.hidden_TH.grad = problem.weight_VH.grad = None
    return middle - start, end - middle, (log_probs.detach(), entropies.detach(), d_hidden)


def undisturbed_seconds(name: str, problem: Problem, implementation: Way, others: float) -> Seconds:
    """(forward, backward) of a run during which other processes took less than a share `others` of the processors."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        before = Processors()
        time.sleep(1)
        if before.share_of_others() > others:
            continue
        before = Processors()
        forward, backward, _ = seconds(problem, implementation)
        share = before.share_of_others()
        print(f"{name}: {forward:.3f} + {backward:.3f} s, others took {share:.0%}", file=sys.stderr)
        if share <= others:
            return forward, backward
    raise SystemExit("other processes keep the processors busy; try again later, or allow more with --others")


class Processors:
    """Measures which processes use the processors, from the time of its creation."""

    def __init__(self) -> None:
        self._started, self._busy, self._own = time.perf_counter(), _busy_s(), time.process_time()

    def share_of_others(self) -> float:
        busy, own = _busy_s() - self._busy, time.process_time() - self._own
        return (busy - own) / (time.perf_counter() - self._started) / (os.cpu_count() or 1)


def _busy_s() -> float:
    """Seconds that all processors together have been busy, or were used by other machines of the host."""
    user, nice, system, _idle, _wait, *interrupts_and_stolen = Path("/proc/stat").read_text().split()[1:9]
    ticks = sum(map(int, (user, nice, system, *interrupts_and_stolen)))
    return ticks / os.sysconf("SC_CLK_TCK")


def _now(problem: Problem) -> float:
    if problem.hidden_TH.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def time_in_turns(problem: Problem, named: dict[str, Way], rounds: int, others: float) -> None:
    expected = seconds(problem, naive)[2]
    differences = {name: _differences(seconds(problem, run)[2], expected) for name, run in named.items()}  # warms up
    spent: dict[str, list[Seconds]] = {name: [] for name in named}
    rates: list[float] = []
    for _ in range(rounds):
        for name, implementation in named.items():
            spent[name].append(undisturbed_seconds(name, problem, implementation, others))
        if problem.hidden_TH.is_cuda:
            rates.append(Meter(problem.hidden_TH.device).product_rate(problem.hidden_TH.dtype))
    print("\n| | forward s | backward s | both s, median (min - max) | of naive | log-prob | entropy | d hidden |")
    print("|---|---|---|---|---|---|---|---|")
    naive_s = statistics.median(map(sum, spent["naive"]))
    for name, times in spent.items():
        both = [sum(pair) for pair in times]
        forward, backward = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"| {name} | {forward:.3f} | {backward:.3f} | {_spread(both)} | {statistics.median(both) / naive_s:.2f} | "
            + " | ".join(f"{difference:.1e}" for difference in differences[name])
            + " |"
        )
    print("\n(last three columns: largest difference from naive; d hidden relative to its largest value)")
    if rates:
        rate, spent_s = statistics.median(rates), statistics.median(map(sum, spent["ours"]))
        useful = 3 * problem.flops_of_a_product / spent_s / rate
        print(f"\nmatrix product {rate / 1e12:.0f} TFLOP/s; ours reaches {useful:.0%} of it counting three products,")
        print(f"{useful * 4 / 3:.0%} counting the fourth, which makes the logits again")


def _differences(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    largest = [(one.float() - other.float()).abs().max().item() for one, other in zip(found, expected, strict=True)]
    largest[2] /= expected[2].float().abs().max().item()
    return largest


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def extra_memory(problem: Problem, implementation: Way) -> int:
    """Peak bytes above the inputs and the gradients that are returned; meant for a fresh process."""
    small = make_problem(64, 256, 64, problem.hidden_TH.dtype, problem.hidden_TH.device.type)
    seconds(small, implementation)  # loads libraries, starts threads, compiles
    before = _memory_from_here(problem)
    seconds(problem, implementation)
    gradients = problem.hidden_TH.nbytes + problem.weight_VH.nbytes
    return _memory_peak(problem) - before - gradients


def _memory_from_here(problem: Problem) -> int:
    """Bytes held now, from which on the peak is taken."""
    if problem.hidden_TH.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's way to reset VmHWM; ru_maxrss survives an exec
    return _memory_peak(problem)


def _memory_peak(problem: Problem) -> int:
    if problem.hidden_TH.is_cuda:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def compare_memory(names: list[str], arguments: list[str]) -> None:
    print("\n| | extra MiB at the peak | of naive |\n|---|---|---|")
    naive_bytes = 0
    for name in names:
        command = [sys.executable, "-m", "benchmarks.log_probs", *arguments, "--memory-of", name]
        # the script itself may run with folders on its path that a fresh interpreter would not have
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=1800)
        extra = int(run.stdout.split()[-1])
        naive_bytes = naive_bytes or extra
        print(f"| {name} | {extra / MIB:,.0f} | {extra / naive_bytes:.1%} |", flush=True)


def compare_blocks(problem: Problem, blocks: list[str], rounds: int, others: float) -> None:
    spent: dict[str, list[float]] = {block: [] for block in blocks}
    seconds(problem, ours)
    for _ in range(rounds):
        for block in blocks:
            tokens, columns = block.split("x")
            module.CPU_BLOCK = module.CUDA_BLOCK = (int(tokens), int(columns))
            spent[block].append(sum(undisturbed_seconds(block, problem, ours, others)))
    print("\n| tokens x columns | MiB | s, median (min - max) |\n|---|---|---|")
    for block, times in spent.items():
        tokens, columns = block.split("x")
        print(f"| {block} | {int(tokens) * int(columns) * 4 / MIB:g} | {_spread(times)} |")


def describe(arguments: argparse.Namespace) -> None:
    versions = {name: metadata.version(name) for name in ("torch", "verl") if util.find_spec(name)}
    print(
        f"{time.strftime('%Y-%m-%d')}; {_processor(arguments.device)}; Python {platform.python_version()}, {versions}"
    )
    print(
        f"tokens {arguments.tokens}, vocabulary {arguments.vocabulary}, hidden {arguments.hidden}, {arguments.dtype}, "
        f"temperature {TEMPERATURE}, threads {torch.get_num_threads()}, rounds {arguments.rounds}, "
        f"load at the start {os.getloadavg()[0]:.1f}"
    )


def _processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    described = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    model = f"{described['model name']} (family {described['cpu family']}, model {described['model']})"
    return f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that warms up")
    parser.add_argument("--blocks", nargs="+", metavar="TOKENSxCOLUMNS", help="compare these block sizes of ours only")
    parser.add_argument("--others", type=float, default=0.1, help="share of the processors others may take")
    parser.add_argument("--memory-of", metavar="NAME", help="print the extra bytes of one implementation and leave")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    named = implementations(arguments.device, dtype)
    if arguments.memory_of is None:
        describe(arguments)
    problem = make_problem(arguments.tokens, arguments.vocabulary, arguments.hidden, dtype, arguments.device)
    if arguments.memory_of is not None:
        print(extra_memory(problem, named[arguments.memory_of]))
    elif arguments.blocks:
        compare_blocks(problem, arguments.blocks, arguments.rounds, arguments.others)
    else:
        time_in_turns(problem, named, arguments.rounds, arguments.others)
        del problem
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
        compare_memory(list(named), sys.argv[1:])


if __name__ == "__main__":
    main()
