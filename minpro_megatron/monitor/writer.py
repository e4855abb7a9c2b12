"""Writes metrics for TensorBoard and as JSON lines; the only file of this folder that imports torch."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tensorboard.compat.proto import summary_pb2
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from minpro_megatron.metrics.declared import check_declared
from minpro_megatron.monitor.dashboard import HEADLINES, LAYOUT
from minpro_megatron.monitor.history import FILE_NAME, Entry, encode_entry

BOARD_FOLDER = "tensorboard"
_PROTOCOL: Any = summary_pb2  # its classes are generated at import, so type checkers do not know them


def board_folder(run_dir: Path) -> Path:
    """The folder of a run's TensorBoard events. TensorBoard names a run by its folder below --logdir, so the run's name
    is the last part."""
    return run_dir / BOARD_FOLDER / run_dir.resolve().name


class RunWriter:
    """Writes to `run_dir/tensorboard` and `run_dir/metrics.jsonl`; one process of a run holds one.

    `step` is the global step, counted from 0; for `eval/` names it is the policy version evaluated, and these
    are written in a separate call.

    >>> with RunWriter(run_dir) as writer:              # doctest: +SKIP
    ...     writer.scalars(0, {"reward/accuracy": 0.25})
    """

    def __init__(self, run_dir: Path, first_step: int | None = None) -> None:
        """`first_step`: the step at which a run resumes. TensorBoard then hides what an interrupted incarnation wrote
        for this and later steps (in metrics.jsonl the last line of a step counts)."""
        self.run_dir = Path(run_dir)
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(board_folder(self.run_dir)), purge_step=first_step)
        self._lines = (Path(run_dir) / FILE_NAME).open("a", encoding="utf-8")
        if self._lines.tell() and not (Path(run_dir) / FILE_NAME).read_bytes().endswith(b"\n"):
            self._lines.write(
                "\n"
            )  # a killed predecessor left an incomplete line; the next line must not be appended to it

    def describe(self, settings: Mapping[str, str | float]) -> None:
        """Writes TensorBoard's dashboard (monitor.dashboard) and the run's settings as hyperparameters."""
        self._board.add_custom_scalars(LAYOUT)
        experiment, start, _ = hparams(dict(settings), dict.fromkeys(HEADLINES))
        self._add(experiment)
        self._add(start)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the scalars of one step. Raises ValueError for a name that METRICS does not declare."""
        check_declared(metrics)
        entry = Entry(step=step, time=time.time(), metrics={name: float(metrics[name]) for name in metrics})
        # one event for all scalars: one event per scalar takes ten times as long
        numbers = [_PROTOCOL.Summary.Value(tag=name, simple_value=number) for name, number in entry.metrics.items()]
        self._add(_PROTOCOL.Summary(value=numbers), step, entry.time)
        self._board.flush()
        self._lines.write(encode_entry(entry))
        self._lines.flush()

    def histogram(self, step: int, name: str, values: Any) -> None:
        """Writes the distribution of `values`, a tensor or array; nothing if it is empty."""
        if len(values):
            self._board.add_histogram(name, values, step)

    def counts(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
        """Writes a distribution given as counts [n] between edges [n + 1] ; nothing without observations."""
        held = np.flatnonzero(counts)
        if not len(held):
            return
        counts, edges = counts[held[0] : held[-1] + 1], edges[held[0] : held[-1] + 2]
        middles = (edges[1:] + edges[:-1]) / 2
        self._board.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=int(counts.sum()),
            sum=float((counts * middles).sum()),
            sum_squares=float((counts * middles**2).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def _add(self, summary: Any, step: int | None = None, time_s: float | None = None) -> None:
        assert self._board.file_writer is not None, "until close"
        self._board.file_writer.add_summary(summary, step, time_s)

    def text(self, step: int, name: str, markdown: str) -> None:
        self._board.add_text(name, markdown, step)

    def close(self) -> None:
        self._board.close()
        self._lines.close()

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
