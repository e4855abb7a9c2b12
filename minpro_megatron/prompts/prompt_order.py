"""Assigns prompts to groups: a function of the run's seed and the group's id only, independent of earlier calls."""

import random
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from minpro_megatron.config.seeds import derive_seed

# A batch uses at most a few epochs or blocks; older ones are not kept.
MAX_CACHED = 4
# Groups whose sources are drawn together. The first group of a distant block costs the draws of all earlier blocks
# once: about a second per million groups.
BLOCK_GROUPS = 4096


class _Cache[Value]:
    """The last few values of a function of a number."""

    def __init__(self, make: Callable[[int], Value]) -> None:
        self._make = make
        self._values: OrderedDict[int, Value] = OrderedDict()

    def __getitem__(self, number: int) -> Value:
        if number not in self._values:
            self._values[number] = self._make(number)
            while len(self._values) > MAX_CACHED:
                self._values.popitem(last=False)
        return self._values[number]


class EpochOrder:
    """Distributes `count` prompts epoch after epoch, each epoch in its own order.

    `first_keys` has a number per prompt; the first epoch is in ascending order of these numbers, and prompts with equal
    numbers are shuffled. `name` distinguishes the orders of one seed.
    """

    def __init__(self, count: int, seed: int, name: str, first_keys: Sequence[float] | None = None) -> None:
        assert count > 0, "an order of no prompts"
        self._count, self._seed, self._name, self._first_keys = count, seed, name, first_keys
        self._epochs = _Cache(self._epoch)

    def __getitem__(self, position: int) -> int:
        """The prompt (0 .. count - 1) at `position`, counted over all epochs."""
        epoch, place = divmod(position, self._count)
        return self._epochs[epoch][place]

    def _epoch(self, epoch: int) -> list[int]:
        # Sorted by random() instead of shuffle(): only random() is guaranteed to return the same numbers in
        # every version of Python.
        generator = random.Random(derive_seed(self._seed, self._name, epoch))
        keys = [generator.random() for _ in range(self._count)]
        order = sorted(range(self._count), key=keys.__getitem__)
        if epoch == 0 and self._first_keys is not None:
            order.sort(key=self._first_keys.__getitem__)
        return order


class SourceDraw:
    """Draws each group's source with probability proportional to its weight, independently.

    A group's position among the groups of its source follows from the draws of all groups before it. They are
    drawn again where needed, so there is no position to store.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self._names = [name for name, weight in weights.items() if weight > 0]
        self._cumulative = list(accumulate(weights[name] for name in self._names))
        self._seed = seed
        self._blocks = _Cache(self._block)
        self._before: list[Counter[str]] = [Counter()]  # [block]: groups of each source in all earlier blocks

    def place(self, group_id: int) -> tuple[str, int]:
        """The group's source, and the number of earlier groups of the same source."""
        number, offset = divmod(group_id, BLOCK_GROUPS)
        while len(self._before) <= number:
            last = len(self._before) - 1
            self._before.append(self._before[last] + Counter(name for name, _ in self._blocks[last]))
        name, earlier_in_block = self._blocks[number][offset]
        return name, self._before[number][name] + earlier_in_block

    def _block(self, number: int) -> list[tuple[str, int]]:
        generator = random.Random(derive_seed(self._seed, "prompt source", number))
        seen: Counter[str] = Counter()
        drawn = []
        for _ in range(BLOCK_GROUPS):
            source = bisect_right(self._cumulative, generator.random() * self._cumulative[-1])
            name = self._names[min(source, len(self._names) - 1)]  # rounding can place a point on the upper end
            drawn.append((name, seen[name]))
            seen[name] += 1
        return drawn
