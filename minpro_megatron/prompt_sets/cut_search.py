"""Adaptive prefix lengths: the place to cut a trace at, so that the prompt with the prefix has a wanted accuracy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

Accuracy = Callable[[int], float | None]  # the measured accuracy of a place, None before it is measured


@dataclass(frozen=True, order=True)
class Band:
    """A wanted share of correct responses, both ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Places:
    """The places of a trace, ascending. Not all `candidates` can be cut at: `is_place` says which, and is asked only
    where a search arrives, because it tokenizes the text before the place."""

    candidates: Sequence[int]
    is_place: Callable[[int], bool] = lambda place: True

    def nearest_to_middle(self, first: int, last: int) -> int | None:
        """The index from `first` to `last` of the place that is nearest to their middle; None if there is none."""
        middle = (first + last) // 2
        pairs = ((middle - distance, middle + distance) for distance in range(last - first + 1))
        near = (index for index in chain.from_iterable(pairs) if first <= index <= last)
        return next((index for index in near if self.is_place(self.candidates[index])), None)


@dataclass(frozen=True)
class Search:
    """The state of a search: the place where the accuracy has to be measured next, or the place that was `found`.
    Neither: no measured accuracy is in the band, and the search has ended."""

    next: int | None = None
    found: int | None = None


def search_cut(places: Places, accuracy: Accuracy, band: Band) -> Search:
    """Bisection over the places with the accuracies measured so far.

    A longer prefix makes a problem easier, so below the band a longer one is tried and above it a shorter one. It is a
    function of the measurements alone: a search that is interrupted continues where it was.
    """
    first, last = 0, len(places.candidates) - 1
    while (middle := places.nearest_to_middle(first, last)) is not None:
        place = places.candidates[middle]
        measured = accuracy(place)
        if measured is None:
            return Search(next=place)
        if measured < band.low:
            first = middle + 1
        elif measured > band.high:
            last = middle - 1
        else:
            return Search(found=place)
    return Search()


def next_places(places: Places, accuracy: Accuracy, bands: Sequence[Band]) -> list[int]:
    """The places to measure next for the searches of all bands, ascending; none once all have ended."""
    wanted = {search_cut(places, accuracy, band).next for band in bands}
    return sorted(place for place in wanted if place is not None)


def found_places(places: Places, accuracy: Accuracy, bands: Sequence[Band]) -> list[int]:
    """The places that the ended searches found, ascending: one for each band that has one, each place once."""
    found = {search_cut(places, accuracy, band).found for band in bands}
    return sorted(place for place in found if place is not None)
