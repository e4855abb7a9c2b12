"""The state of the other nodes of a start while the roles run."""

import time
from collections.abc import Callable, Mapping

from minpro_megatron.launch.preflight.node_checks import node_name
from minpro_megatron.launch.starts import NodeEnd, Start

_LOOK_EVERY_S = 1.0


class OthersFailed(Exception):
    """Another node has failed; the message states which and why."""


class OtherNodes:
    """The state of the other nodes, read once per second to limit the load on a shared file system."""

    def __init__(self, start: Start, index: int, num_nodes: int, deciding: list[int]) -> None:
        self._start, self._index, self._num_nodes, self._deciding = start, index, num_nodes, deciding
        self._next_look = 0.0
        self._are_done = False

    def also(self, tick: Callable[[], None]) -> Callable[[], None]:
        """`tick`, and a check of the other nodes, which raises OthersFailed."""

        def both() -> None:
            tick()
            if self._num_nodes > 1 and time.monotonic() > self._next_look:
                self._look()
                self._next_look = time.monotonic() + _LOOK_EVERY_S

        return both

    def others_are_done(self) -> bool:
        return self._are_done

    def _look(self) -> None:
        failed = self._start.failed(self._num_nodes)
        failed.pop(self._index, None)
        if failed:
            raise OthersFailed(failure_text(failed))
        self._are_done = self._start.are_done(self._deciding)


def failure_text(failed: Mapping[int, NodeEnd]) -> str:
    """The nodes that have failed, and why, in one line."""
    return "; ".join(f"{node_name(node, end.host)} failed: {end.why}" for node, end in failed.items())
