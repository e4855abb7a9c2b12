"""TensorBoard's events of a run; the only file of this folder that imports torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto import summary_pb2
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from minpro_megatron.monitor.dashboard import HEADLINES, LAYOUT

FOLDER = "tensorboard"
_PROTOCOL: Any = summary_pb2  # its classes are generated at import, so type checkers do not know them


def board_folder(run_dir: Path) -> Path:
    """The folder of a run's events. TensorBoard names a run by its folder below --logdir, so the run's name is the last
    part."""
    return run_dir / FOLDER / run_dir.resolve().name


class TensorBoard:
    """A `monitor.board.Board` that writes to `board_folder(run_dir)`."""

    def __init__(self, run_dir: Path, first_step: int | None = None) -> None:
        """`first_step`: the step at which a run resumes. TensorBoard then hides what an interrupted incarnation wrote
        for this and later steps."""
        self._board = SummaryWriter(str(board_folder(run_dir)), purge_step=first_step)

    def describe(self, settings: Mapping[str, str | float]) -> None:
        """Writes the dashboard (monitor.dashboard) and the settings as hyperparameters."""
        self._board.add_custom_scalars(LAYOUT)
        experiment, start, _ = hparams(dict(settings), dict.fromkeys(HEADLINES))
        self._add(experiment)
        self._add(start)

    def scalars(self, step: int, metrics: Mapping[str, float], time_s: float) -> None:
        # one event for all scalars: one event per scalar takes ten times as long
        numbers = [_PROTOCOL.Summary.Value(tag=name, simple_value=number) for name, number in metrics.items()]
        self._add(_PROTOCOL.Summary(value=numbers), step, time_s)
        self._board.flush()

    def histogram(self, step: int, name: str, values: Any) -> None:
        self._board.add_histogram(name, values, step)

    def counts(self, step: int, name: str, counts: np.ndarray, edges: np.ndarray) -> None:
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

    def text(self, step: int, name: str, markdown: str) -> None:
        self._board.add_text(name, markdown, step)

    def close(self, failed: bool) -> None:
        self._board.close()

    def _add(self, summary: Any, step: int | None = None, time_s: float | None = None) -> None:
        assert self._board.file_writer is not None, "until close"
        self._board.file_writer.add_summary(summary, step, time_s)
