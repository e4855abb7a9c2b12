"""What a check finds: figures, and the limits that some of them must keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# A figure is None where the device cannot give it: a CPU has no allocator with counters.
Figure = float | int | str | None


class Limit(NamedTuple):
    """The figure `name` must be at most, or at least, a value; None is no limit."""

    name: str
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        parts = [f">= {self.at_least:g}"] if self.at_least is not None else []
        return f"{self.name} " + " and ".join([*parts, f"<= {self.at_most:g}"] if self.at_most is not None else parts)


@dataclass(frozen=True)
class Outcome:
    """`problems` has a line for each reason why the check failed; without one it has passed."""

    figures: Mapping[str, Figure]
    problems: Sequence[str] = field(default_factory=tuple)


class Skipped(Exception):
    """The check cannot run here; the message is the reason."""


def judged(figures: Mapping[str, Figure], limits: Sequence[Limit], problems: Sequence[str] = ()) -> Outcome:
    """The outcome of `figures` against `limits`, with `problems` that were found otherwise. A figure that is NaN, or
    missing altogether, breaks its limit."""
    found = list(problems)
    for limit in limits:
        if limit.name not in figures:
            found.append(f"{limit.name} was not measured")
            continue
        value = figures[limit.name]
        if value is None:
            continue
        number = float(value)
        if limit.at_most is not None and not number <= limit.at_most:
            found.append(f"{limit.name} = {number:.4g}, at most {limit.at_most:g} is allowed")
        if limit.at_least is not None and not number >= limit.at_least:
            found.append(f"{limit.name} = {number:.4g}, at least {limit.at_least:g} is needed")
    return Outcome(dict(figures), found)
