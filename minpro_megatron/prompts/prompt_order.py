"""Which prompt a group gets: a function of the run's seed and the group's id alone, whatever was asked before."""

import random
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

from minpro_megatron.config.seeds import derive_seed

# A batch touches at most a few epochs or blocks; older ones are not kept.
MAX_CACHED = 4
# Groups whose sources are drawn together. The first group of a distant block costs the draws of all blocks before it
# once: about a second a million groups.
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
    """Deals `count` prompts epoch after epoch, each in an order of its own.

    `first_keys`, a number for each prompt, puts the first epoch into their ascending order; equal ones are shuffled.
    `name` tells apart the orders of one seed.
    """

    def __init__(self, count: int, seed: int, name: str, first_keys: Sequence[float] | None = None) -> None:
        assert count > 0, "an order of no prompts"
        self._count, self._seed, self._name, self._first_keys = count, seed, name, first_keys
        self._epochs = _Cache(self._epoch)

    def __getitem__(self, position: int) -> int:
        """The prompt (0 .. count - 1) that is dealt at `position` of all positions."""
        epoch, place = divmod(position, self._count)
        return self._epochs[epoch][place]

    def _epoch(self, epoch: int) -> list[int]:
        # Sorting by random() and not shuffle(): of the two only random() is promised to give the same
        # numbers in every version of Python.
        generator = random.Random(derive_seed(self._seed, self._name, epoch))
        keys = [generator.random() for _ in range(self._count)]
        order = sorted(range(self._count), key=keys.__getitem__)
        if epoch == 0 and self._first_keys is not None:
            order.sort(key=self._first_keys.__getitem__)
        return order


class SourceDraw:
    """Draws each group's source with probability proportional to its weight, independently.

    A group's place among the groups of its source follows from the draws of all groups before it; they are
    drawn again where they are needed, so there is no position to keep.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self._names = [name for name, weight in weights.items() if weight > 0]
        self._cumulative = list(accumulate(weights[name] for name in self._names))
        self._seed = seed
        self._blocks = _Cache(self._block)
        self._before: list[Counter[str]] = [Counter()]  # [block]: groups of each source in all earlier blocks

    def place(self, group_id: int) -> tuple[str, int]:
        """The group's source, and how many groups before it have the same one."""
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
            name = self._names[min(source, len(self._names) - 1)]  # rounding can put a point on the upper end
            drawn.append((name, seen[name]))
            seen[name] += 1
        return drawn
