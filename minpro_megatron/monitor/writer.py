"""Writes a run's metrics: as JSON lines, and to the boards that display them."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from minpro_megatron.metrics.declared import check_declared
from minpro_megatron.monitor.board import Board
from minpro_megatron.monitor.history import FILE_NAME, Entry, encode_entry
from minpro_megatron.monitor.tensorboard_board import TensorBoard


class RunWriter:
    """Writes to `run_dir/metrics.jsonl`, to TensorBoard, and to other boards; one process of a run holds one.

    `step` is the global step, counted from 0; for `eval/` names it is the policy version evaluated, and these
    are written in a separate call.

    >>> with RunWriter(run_dir) as writer:              # doctest: +SKIP
    ...     writer.scalars(0, {"reward/accuracy": 0.25})
    """

    def __init__(self, run_dir: Path, first_step: int | None = None, others: Sequence[Board] = ()) -> None:
        """`first_step`: the step at which a run resumes. TensorBoard then hides what an interrupted incarnation wrote
        for this and later steps (in metrics.jsonl the last line of a step counts). `others`: boards beside
        TensorBoard, which are closed with this."""
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard = TensorBoard(self.run_dir, first_step)
        self._boards: list[Board] = [self._tensorboard, *others]
        self._lines = (self.run_dir / FILE_NAME).open("a", encoding="utf-8")
        if self._lines.tell() and not (self.run_dir / FILE_NAME).read_bytes().endswith(b"\n"):
            # a killed predecessor left an incomplete line; the next line must not be appended to it
            self._lines.write("\n")

    def describe(self, settings: Mapping[str, str | float]) -> None:
        """Writes TensorBoard's dashboard and the run's settings as its hyperparameters."""
        self._tensorboard.describe(settings)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the scalars of one step. Raises ValueError for a name that METRICS does not declare."""
        check_declared(metrics)
        entry = Entry(step=step, time=time.time(), metrics={name: float(metrics[name]) for name in metrics})
        for board in self._boards:
            board.scalars(step, entry.metrics, entry.time)
        self._lines.write(encode_entry(entry))
        self._lines.flush()

    def histogram(self, step: int, name: str, values: Any) -> None:
        """Writes the distribution of `values`, a tensor or array; nothing if it is empty."""
        if len(values):
            for board in self._boards:
                board.histogram(step, name, values)

    def counts(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Writes a distribution given as counts [n] between edges [n + 1]; nothing without observations."""
        held = np.flatnonzero(counts)
        if len(held):
            first, last = held[0], held[-1]
            for board in self._boards:
                board.counts(step, name, counts[first : last + 1], edges[first : last + 2])

    def text(self, step: int, name: str, markdown: str) -> None:
        for board in self._boards:
            board.text(step, name, markdown)

    def close(self, failed: bool = False) -> None:
        for board in self._boards:
            board.close(failed)
        self._lines.close()

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)
