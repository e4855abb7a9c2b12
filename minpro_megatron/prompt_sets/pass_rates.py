"""Measured pass rates in prompt files: every row keeps its bytes, except for the two fields that are written."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec


class Measured(msgspec.Struct, frozen=True):
    """How a row's pass rate was measured: `right` of the model's `samples` were correct."""

    model: str
    samples: int
    right: int

    @property
    def pass_rate(self) -> float:
        return self.right / self.samples


def rows_with_pass_rates(
    lines: Iterable[bytes],
    measured: Mapping[str, Measured],
    is_wanted: Callable[[Measured], bool] = lambda found: True,
) -> list[str]:
    """The rows of a prompt file in their order, each with the fields `pass_rate` and `measured` of its id; only those
    that are wanted. Earlier values of the two fields are replaced; those of all other fields keep their bytes. Empty
    lines are left out."""
    rows = []
    for line in lines:
        if not line.strip():
            continue
        row: dict[str, Any] = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        found = measured[msgspec.json.decode(row["id"])]
        if is_wanted(found):
            rows.append(msgspec.json.encode(row | {"pass_rate": found.pass_rate, "measured": found}).decode())
    return rows
