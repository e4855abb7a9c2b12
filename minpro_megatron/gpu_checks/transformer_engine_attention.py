"""Which attention kernels Transformer Engine chooses for packed rows, as it logs it."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from minpro_megatron.gpu_checks.outcome import Limit, Outcome, judged
from minpro_megatron.gpu_checks.subject import Slice, make_policy
from minpro_megatron.parallel.mesh import Mesh

# Transformer Engine's logger says for each call: Running with FusedAttention backend (sub-backend 1).
_LOGGER = "DotProductAttention"
_CHOICE = re.compile(r"Running with (\w+) backend")
UNFUSED = "UnfusedDotProductAttention"


@dataclass(frozen=True)
class Shapes(Slice):
    backend: str = "transformer_engine"


FULL = (
    Shapes(layers=1, tokens=8192, sequence_tokens=2048, row_tokens=8192, experts=16, vocabulary=32768),
    (Limit("choices_logged", at_least=1), Limit("unfused_choices", at_most=0)),
)
SMALL = (
    Shapes(layers=1, tokens=128, sequence_tokens=64, row_tokens=128, divisor=32, vocabulary=300),
    FULL[1],
)


def check(mesh: Mesh, shapes: Shapes, limits: tuple[Limit, ...]) -> Outcome:
    """One update of a layer. The unfused attention would hold a matrix of scores, which the plan does not count."""
    with chosen_kernels() as chosen:
        policy = make_policy(mesh, shapes.config(mesh.device.type), shapes.architecture())
        policy.update(shapes.sequences(), 1e-6)
    figures = {
        "kernels": ", ".join(sorted(set(chosen))) or "none logged",
        "choices_logged": len(chosen),
        "unfused_choices": chosen.count(UNFUSED),
    }
    return judged(figures, limits)


@contextmanager
def chosen_kernels() -> Iterator[list[str]]:
    """Context manager: the list gets the name of the kernels of each attention that runs inside."""
    found: list[str] = []

    class Choices(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if match := _CHOICE.search(record.getMessage()):
                found.append(match[1])

    logger, handler = logging.getLogger(_LOGGER), Choices(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
