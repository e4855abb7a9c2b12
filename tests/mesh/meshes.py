"""All the ways to lay a model over up to eight ranks, and a few of them that together try every pair of choices."""

from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from itertools import combinations, product
from math import prod
from random import Random
from typing import Any

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.models.architecture import Architecture, refuse_uneven_cuts

MAX_RANKS = 8
ATTEMPTS = 25


@dataclass(frozen=True, order=True)
class Degrees:
    """The factorisation of a mesh; `expert` is cut out of tensor x context x data and takes no ranks of its own."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    context: int = 1
    data: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def as_settings(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "TP{} PP{} EP{} CP{} DP{}".format(*astuple(self))


@dataclass(frozen=True, order=True)
class Case:
    """One thing to try: a model on a mesh, with several sequences a row or one."""

    model: str
    degrees: Degrees
    packing: bool

    def __str__(self) -> str:
        return f"{self.model} {self.degrees} {'packed' if self.packing else 'unpacked'}"

    @property
    def levels(self) -> tuple[str, ...]:
        """The choice on every axis; degrees above two count as one choice."""
        degrees = (str(degree) if degree <= 2 else "more" for degree in astuple(self.degrees))
        return (self.model, str(self.packing), *degrees)


def allowed_degrees(architecture: Architecture, max_ranks: int = MAX_RANKS) -> list[Degrees]:
    """Every factorisation with at most `max_ranks` ranks that the package's own rules allow for the model."""
    axis = range(1, max_ranks + 1)
    found = (Degrees(*degrees) for degrees in product(axis, repeat=5) if _ranks(degrees) <= max_ranks)
    return [degrees for degrees in found if _is_allowed(degrees, architecture)]


def _ranks(degrees: tuple[int, ...]) -> int:
    tensor, pipeline, _, context, data = degrees
    return prod((tensor, pipeline, context, data))


def _is_allowed(degrees: Degrees, architecture: Architecture) -> bool:
    try:
        refuse_uneven_cuts(architecture, ParallelConfig(**degrees.as_settings))
    except ValueError:  # pydantic's error is one too
        return False
    return True


def all_cases(architectures: dict[str, Architecture]) -> list[Case]:
    return [
        Case(model, degrees, packing)
        for model, architecture in architectures.items()
        for degrees in allowed_degrees(architecture)
        for packing in (True, False)
    ]


def pairs(case: Case) -> frozenset[tuple[tuple[int, str], ...]]:
    """The case's choices on every two axes."""
    return frozenset(combinations(enumerate(case.levels), 2))


def pairwise_cover(cases: Iterable[Case], first: Case) -> list[Case]:
    """A few of `cases` in which every pair of choices occurs that occurs in any of them; begins with `first`.

    Greedy, always a case with the most new pairs; of a few ways to break ties, that with the fewest cases and ranks.
    """
    pairs_of = {case: pairs(case) for case in sorted(cases)}
    attempts = [_greedy_cover(pairs_of, first, Random(seed)) for seed in range(ATTEMPTS)]
    return min(attempts, key=lambda cover: (len(cover), sum(case.degrees.num_ranks for case in cover)))


def _greedy_cover(pairs_of: dict[Case, frozenset], first: Case, random: Random) -> list[Case]:
    cover = [first]
    missing = set().union(*pairs_of.values()) - pairs(first)
    while missing:
        num_new = {case: len(found & missing) for case, found in pairs_of.items()}
        most = max(num_new.values())
        cover.append(random.choice([case for case, count in num_new.items() if count == most]))
        missing -= pairs_of[cover[-1]]
    return cover
