"""The parts of a server's memory that the trainer uses meanwhile: /release_memory_occupation and its counterpart.

As with SGLang 0.5.23 the process ends if a part is released while a response is under way, or resumed although it is
not released. The weights are really freed. Once resumed they are NaN until they are sent again; SGLang's are undefined.
"""

import logging
import os
from collections.abc import Iterable
from typing import Literal, get_args

import msgspec

from minpro_megatron.reference_engine.engine import Engine

log = logging.getLogger(__name__)

Part = Literal["kv_cache", "weights", "cuda_graph"]


class MemoryParts(msgspec.Struct):
    """The body of both requests; no tags are all of them."""

    tags: list[Part] | None = None


class OccupiedMemory:
    """What is released at the moment. All methods run in the sampling thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._released: set[Part] = set()

    @property
    def has_weights(self) -> bool:
        return "weights" not in self._released

    def release(self, asked: MemoryParts) -> None:
        if not self._engine.is_idle():
            end_process("release_memory_occupation should be called only when server is idle.")
        parts = _parts(asked)
        if "kv_cache" in parts:
            self._engine.flush_cache()
        if "weights" in parts and self.has_weights:
            self._engine.model.release()
        self._released |= parts
        if not self.has_weights:
            log.info("the weights are released")

    def resume(self, asked: MemoryParts) -> None:
        parts = _parts(asked)
        if missing := parts - self._released:
            end_process(f"resume_memory_occupation of parts that are not released: {sorted(missing)}")
        if "weights" in parts:
            self._engine.model.resume()
        self._released -= parts


def _parts(asked: MemoryParts) -> set[Part]:
    chosen: Iterable[Part] = asked.tags or get_args(Part)
    return set(chosen)


def end_process(why: str) -> None:
    """Ends the server, as an error in SGLang's scheduler does."""
    log.critical("the server ends: %s", why)
    os._exit(1)
