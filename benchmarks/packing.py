"""What the busiest rank computes in an update, against the lower bound, and the processor time of packing.

For several length distributions and numbers of data-parallel ranks: the rows of this project at their own length, the
same rows padded to one length, and Karmarkar-Karp's largest differencing method as verl uses it: once to divide the
sequences among the ranks, and once for each rank to divide its share into micro-batches.
"""

import argparse
import heapq
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from minpro_megatron.actor.flops import forward_flops
from minpro_megatron.batching.packing import pack_rows, share_rows
from minpro_megatron.batching.row_lengths import padding_sequences, row_length, with_row_padding
from minpro_megatron.models.known_models.find import find_architecture

# mean and sigma of log-normal responses, limit, all in tokens
DISTRIBUTIONS = {
    "mean 2k, sigma 0.8": (2_048, 0.8, 20_480),
    "mean 8k, sigma 0.7": (8_192, 0.7, 20_480),
    "mean 14k, sigma 0.5": (14_336, 0.5, 20_480),
}
PROMPT_TOKENS = 200
CONTEXT, TENSOR = 2, 2
SEQUENCE_MULTIPLE = 2 * CONTEXT
MODEL = "Qwen/Qwen3-30B-A3B"

Rank = list[list[int]]  # the lengths of the sequences of each micro-batch, as they are computed


def draw(name: str, count: int, seed: int) -> list[int]:
    mean, sigma, limit = DISTRIBUTIONS[name]
    random = np.random.default_rng(seed)
    scale = _scale(mean, sigma, limit)
    lengths = np.minimum(scale * random.lognormal(0, sigma, count), limit).astype(int) + PROMPT_TOKENS
    return [-(-int(length) // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE for length in lengths]


def _scale(mean: float, sigma: float, limit: float) -> float:
    """The median of the log-normal lengths whose mean, cut at the limit, is `mean`."""
    shapes = np.random.default_rng(0).lognormal(0, sigma, 100_000)
    low, high = 0.0, 10 * mean
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(middle * shapes, limit).mean() < mean else (low, middle)
    return high


def own_length(lengths: list[int], cost: Callable[[int], float], row_tokens: int, data: int) -> list[Rank]:
    rows = _rows(lengths, cost, row_tokens, data)
    padded = [with_row_padding(row, row_length(row, CONTEXT, TENSOR)) for row in rows]
    return _shared(padded, [sum(map(cost, row)) for row in padded], data)


def one_length(lengths: list[int], cost: Callable[[int], float], row_tokens: int, data: int) -> list[Rank]:
    """The same rows, each padded to the longest one; they are shared by their cost without padding."""
    rows = _rows(lengths, cost, row_tokens, data)
    longest = max(row_length(row, CONTEXT, TENSOR) for row in rows)
    padded = [with_row_padding(row, longest) for row in rows]
    return _shared(padded, [sum(map(cost, row)) for row in rows], data)


def _rows(lengths: list[int], cost: Callable[[int], float], row_tokens: int, data: int) -> list[list[int]]:
    rows = pack_rows(lengths, [cost(length) for length in lengths], row_tokens, data)
    return [[lengths[index] for index in row] for row in rows]


def _shared(rows: list[list[int]], costs: list[float], data: int) -> list[Rank]:
    return [[rows[row] for row in share] for share in share_rows(costs, data)]


def karmarkar_karp(lengths: list[int], cost: Callable[[int], float], row_tokens: int, data: int) -> list[Rank]:
    """Every rank has as many micro-batches as the rank that needs most; no padding."""
    costs = [cost(length) for length in lengths]
    shares = [[lengths[index] for index in share] for share in largest_differencing(costs, data)]
    count = max(math.ceil(sum(share) / row_tokens) for share in shares)
    while True:
        ranks = [_micro_batches(share, cost, count) for share in shares]
        if all(sum(row) <= row_tokens for rank in ranks for row in rank):
            return ranks
        count += 1


def _micro_batches(share: list[int], cost: Callable[[int], float], count: int) -> Rank:
    rows = [[share[index] for index in part] for part in largest_differencing([cost(one) for one in share], count)]
    return sorted(rows, key=lambda row: -sum(map(cost, row)))


def largest_differencing(values: Sequence[float], parts: int) -> list[list[int]]:
    """The indices of `values` in `parts` parts of similar sums (Karmarkar and Karp, 1982, for several parts): the two
    partial partitions whose sums differ most are joined, the largest part of one with the smallest of the other."""
    order = itertools.count()
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []

    def push(partition: list[tuple[float, list[int]]]) -> None:
        partition.sort(key=lambda part: -part[0])
        heapq.heappush(heap, (partition[-1][0] - partition[0][0], next(order), partition))

    for index, value in enumerate(values):
        push([(value, [index]), *((0.0, []) for _ in range(parts - 1))])
    while len(heap) > 1:
        one, other = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        push([(a + b, left + right) for (a, left), (b, right) in zip(one, reversed(other), strict=True)])
    return [indices for _, indices in heap[0][2]] if heap else [[] for _ in range(parts)]


def surplus(ranks: list[Rank], cost: Callable[[int], float], bound: float, together: int) -> float:
    """How much longer than `bound` the slowest group of `together` ranks works, which wait for each other in every
    micro-batch."""
    costs = [[sum(map(cost, row)) for row in rank] for rank in ranks]
    groups = [costs[first : first + together] for first in range(0, len(costs), together)]
    return max(sum(map(max, zip(*group, strict=True))) for group in groups) / bound - 1


KINDS = {"own length": own_length, "one length": one_length, "Karmarkar-Karp": karmarkar_karp}


def compare(arguments: argparse.Namespace) -> None:
    cost = forward_flops(find_architecture(MODEL)).of
    print(f"| lengths | data | {' | '.join(f'{kind}: rank, group of 2' for kind in KINDS)} |")
    print("|---|" + "---|" * (1 + len(KINDS)))
    for name in DISTRIBUTIONS:
        for data in arguments.data:
            cells = _surpluses(name, data, cost, arguments)
            print(f"| {name} | {data} | {' | '.join(cells)} |", flush=True)


def _surpluses(name: str, data: int, cost: Callable[[int], float], arguments: argparse.Namespace) -> list[str]:
    """Percent of a rank, and of a group of two, for each kind; medians over the mini-batches."""
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for seed in range(arguments.draws):
        lengths = draw(name, arguments.sequences, seed)
        bound = sum(map(cost, lengths)) / data
        for kind, divide in KINDS.items():
            ranks = divide(lengths, cost, arguments.row_tokens, data)
            found[kind].append((surplus(ranks, cost, bound, 1), surplus(ranks, cost, bound, 2)))
    return [", ".join(f"{100 * statistics.median(of):.1f}" for of in zip(*found[kind], strict=True)) for kind in KINDS]


def count_numbers(arguments: argparse.Namespace) -> None:
    """How many numbers of sequences the rows of 64 updates have, without and with sequences of padding."""
    cost = forward_flops(find_architecture(MODEL)).of
    print("\n| lengths | numbers of sequences in a row | last update with a new one | powers of two | more tokens, % |")
    print("|---|---|---|---|---|")
    for name in DISTRIBUTIONS:
        seen: dict[int, int] = {}
        added = tokens = 0
        for update in range(64):
            for row in _rows(draw(name, arguments.sequences, update), cost, arguments.row_tokens, 6):
                seen.setdefault(len(row), update)
                added += sum(padding_sequences(len(row), CONTEXT))
                tokens += sum(row)
        powers = {number + len(padding_sequences(number, CONTEXT)) for number in seen}
        cells = (len(seen), max(seen.values()) + 1, len(powers), f"{100 * added / tokens:.3f}")
        print(f"| {name} | {' | '.join(map(str, cells))} |", flush=True)


def time_packing(arguments: argparse.Namespace) -> None:
    cost = forward_flops(find_architecture(MODEL)).of
    print("\n| sequences | rows | pack_rows, s | Karmarkar-Karp over the same number of parts, s |\n|---|---|---|---|")
    for count in arguments.counts:
        lengths = draw("mean 8k, sigma 0.7", count, 0)
        costs = [cost(length) for length in lengths]
        rows, own_s = _timed(lambda: pack_rows(lengths, costs, arguments.row_tokens, 8))  # noqa: B023
        cell = "not run"
        if count <= arguments.most_compared:
            _, other_s = _timed(lambda: largest_differencing(costs, len(rows)))  # noqa: B023
            cell = f"{other_s:.2f}"
        print(f"| {count} | {len(rows)} | {own_s:.3f} | {cell} |", flush=True)


def _timed[Result](work: Callable[[], Result]) -> tuple[Result, float]:
    started = time.process_time()
    return work(), time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256, help="of an update")
    parser.add_argument("--row-tokens", type=int, default=32_768)
    parser.add_argument("--data", type=int, nargs="+", default=[2, 4, 6, 8, 12, 16])
    parser.add_argument("--draws", type=int, default=20, help="the median of so many mini-batches is reported")
    parser.add_argument("--counts", type=int, nargs="+", default=[512, 1_024, 2_048, 4_096, 8_192, 16_384])
    parser.add_argument("--most-compared", type=int, default=2_048)
    arguments = parser.parse_args()
    compare(arguments)
    count_numbers(arguments)
    time_packing(arguments)


if __name__ == "__main__":
    main()
