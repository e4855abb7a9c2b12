"""What a rehearsal of one rank found, as it is printed, compared and stored as JSON."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Phase:
    """Bytes of tensors by device type ("cuda", "cpu") in one phase of a global step."""

    name: str
    entry: dict[str, int] = field(default_factory=dict)  # at its beginning; the most, if it is entered several times
    peak: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)  # at its end
    operators: int = 0
    # of the peak, and of what is left: [line of code that allocated, bytes] by device type, largest first
    peak_lines: dict[str, list[list[Any]]] = field(default_factory=dict)
    left_lines: dict[str, list[list[Any]]] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class Collective:
    """One kind of collective: `count` calls in a phase with equal group, size, dtype and device."""

    phase: str
    name: str
    group: str  # with its number of ranks: tensor_model_parallel[2]
    backend: str  # nccl or gloo
    device: str
    dtype: str
    num_bytes: int  # of the larger of input and output, each call
    count: int


@dataclass(frozen=True, order=True)
class HostRead:
    """The host waits for the device: `count` times in a phase at one line of the project or of a library."""

    phase: str
    kind: str  # such as "item", "boolean index", "copy to host"
    line: str
    count: int


@dataclass(frozen=True)
class Component:
    """A component of a rank's memory: bytes of the rehearsal, and bytes of the planner."""

    name: str
    measured: int
    planned: int

    @property
    def error(self) -> float | None:
        """(planned - measured) / measured; None if nothing was measured."""
        return (self.planned - self.measured) / self.measured if self.measured > 0 else None


@dataclass(frozen=True)
class RankRehearsal:
    """The rehearsal of one rank."""

    recipe: str
    rank: int
    place: str  # on the mesh, in words
    problems: list[str]  # device, dtype and shape mismatches, each with phase and line; empty if there are none
    phases: list[Phase]
    collectives: list[Collective]
    host_reads: list[HostRead]
    components: list[Component]
    process_peak_bytes: int  # of host memory that the rehearsal itself took
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "RankRehearsal":
        kinds: dict[str, Any] = {
            "phases": Phase,
            "collectives": Collective,
            "host_reads": HostRead,
            "components": Component,
        }
        built: dict[str, Any] = {name: [kind(**one) for one in content[name]] for name, kind in kinds.items()}
        return cls(**(content | built))
