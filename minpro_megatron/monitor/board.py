"""The interface of what displays a run's metrics while it runs: TensorBoard, Weights & Biases."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Board(Protocol):
    """Receives what `monitor.writer.RunWriter` writes. `step` is the global step, or for evaluations the policy
    version."""

    def scalars(self, step: int, metrics: Mapping[str, float], time_s: float) -> None:
        """The scalars of one step; `time_s` is the Unix time."""
        ...

    def histogram(self, step: int, name: str, values: Any) -> None:
        """The distribution of `values`, a tensor or array that is not empty."""
        ...

    def counts(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """A distribution given as counts [n] between edges [n + 1], with observations in the first and the last bin."""
        ...

    def text(self, step: int, name: str, markdown: str) -> None:
        """A text in Markdown."""
        ...

    def close(self, failed: bool) -> None:
        """The end of this start; `failed`: by an exception."""
        ...
