"""Garbage is collected when all ranks ask for it, and at no other moment."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from minpro_megatron.actor import garbage


class Node:
    """A part of a reference cycle."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def collections() -> Iterator[list[str]]:
    """The phases of collections since the start."""
    seen: list[str] = []

    def note(phase: str, details: dict[str, int]) -> None:
        seen.append(phase)

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_cycles_stay_until_the_ranks_collect(collections: list[str]) -> None:
    with garbage.collected_together():
        collections.clear()
        nodes = [Node() for _ in range(10_000)]  # ten times what starts a collection
        last = weakref.ref(nodes[-1])
        del nodes
        assert collections == []
        assert last() is not None
        garbage.collect()
        assert last() is None
        assert collections == ["start", "stop"]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_nothing_is_collected_twice(collections: list[str]) -> None:
    """Where Python collects by itself."""
    garbage.collect()
    assert collections == []


def test_python_collects_again_after_an_error() -> None:
    with pytest.raises(ValueError, match="planted"), garbage.collected_together():
        raise ValueError("planted")
    assert gc.isenabled()
