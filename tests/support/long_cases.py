"""Which cases of a test `make test` runs: one of each property; the same property elsewhere is for `make test-long`."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def long_after(count: int, cases: Iterable[Any]) -> list[Any]:
    """Values of one parameter: the first `count` as they are, the others marked `long`."""
    return [case if place < count else pytest.param(case, marks=pytest.mark.long) for place, case in enumerate(cases)]


def long_rows_after(count: int, rows: Iterable[Sequence[Any]]) -> list[Any]:
    """The same for rows of several parameters."""
    return [row if place < count else pytest.param(*row, marks=pytest.mark.long) for place, row in enumerate(rows)]
