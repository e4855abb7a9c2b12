"""Writing a sharded state into megatron's distributed checkpoint format, with checksums, at once or in the background.

megatron plans which rank writes what and forks a process to write it (`TemporalAsyncCaller`). Between the two stands a
manager process of its own for the results, which takes seconds to start and outlives a killed rank, and after them a
finalisation in which a full disk on rank 0 leaves the other ranks waiting. Both are done here: results come back
through an unnamed file, and every step that one rank can fail at ends with all ranks knowing.
"""

import os
import pickle
import queue
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.rollout.resume_point import SavedFile
from minpro_megatron.weights.manifest import METADATA, record_file

_BACKEND_FILE = "metadata.json"
_NICENESS = 10  # of the writing process: training comes first


class SaveError(RuntimeError):
    """A checkpoint could not be written. Raised on all ranks alike."""


def on_rank_0[T](mesh: Mesh, action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on all ranks. Collective. Raises on all ranks what it raised there: ValueError,
    or SaveError for an OSError."""
    value: T | None = None
    error: ValueError | SaveError | None = None
    if mesh.rank == 0:
        try:
            value = action()
        except OSError as found:
            error = SaveError(str(found))
        except ValueError as found:
            error = ValueError(str(found))
    value, error = mesh.from_rank_0((value, error))
    if error is not None:
        raise error
    return cast(T, value)


@dataclass
class _Written:
    """What a rank wrote, or why it could not."""

    results: list[Any] = field(default_factory=list)  # torch's WriteResult of every tensor and object
    files: dict[str, SavedFile] = field(default_factory=dict)
    error: str | None = None


class _Planned(TorchDistSaveShardedStrategy):
    """megatron's strategy up to the point where every rank knows what to write."""

    writer: FileSystemWriterAsync
    metadata: Any  # rank 0's: where every part of every tensor will be

    def _get_save_and_finalize_callbacks(self, writer: Any, save_state_dict_ret: Any, async_strategy: str) -> Any:
        self.writer, self.metadata, _ = writer, *save_state_dict_ret[1:]
        return AsyncRequest(None, (), [])


class ShardWrite:
    """One save of a sharded state. Every method is collective."""

    def __init__(self, state: dict[str, Any], folder: Path, mesh: Mesh, in_background: bool) -> None:
        """Starts to write `state` into the empty `folder`; in the background, as it is now."""
        self._folder = folder
        self._mesh = mesh
        self._plan = _Planned()
        with warnings.catch_warnings(), _no_manager_process():
            warnings.simplefilter("ignore")
            dist_checkpointing.save(state, str(folder), self._plan, async_sharded_save=True, async_strategy="mcore")
        writer = self._plan.writer
        buckets, writer.write_buckets = writer.write_buckets or [], None
        self._caller = TemporalAsyncCaller()
        self._process: Any = None
        self._report: IO[bytes] | None = None
        self._written = _Written()  # until the background says otherwise
        to_host = partial(writer.preload_tensors, buckets, True)
        if in_background:
            self._start_process(writer, buckets, to_host)
        else:
            self._written = _write(writer, to_host())

    def _start_process(self, writer: FileSystemWriterAsync, buckets: list[Any], to_host: Callable) -> None:
        # The forked process has this one's memory as it is now: what training changes meanwhile is copied, by pages.
        try:
            self._report = tempfile.TemporaryFile()  # noqa: SIM115  `_result` closes it
            request = AsyncRequest(_write_and_report, (writer, buckets, self._report), [], preload_fn=to_host)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of threads that the child will not have; it only writes
                self._caller.schedule_async_call(request)
        except OSError as error:  # no memory for a process; the other ranks learn of it in `complete`
            self._caller = TemporalAsyncCaller()  # the former would wait for a process that never was
            self._report, self._written = None, _Written(error=f"no process to write in: {error}")
        self._process = self._caller.process

    def is_done(self, wait: bool) -> bool:
        """Whether all ranks have written; with `wait`, once they have."""
        return self._caller.is_current_async_call_done(blocking=wait)

    def complete(self) -> dict[str, SavedFile]:
        """After `is_done`: write the metadata. Returns the folder's files on rank 0, nothing elsewhere.

        Raises SaveError on all ranks if any of them could not write.
        """
        every: list[_Written] = [_Written()] * self._mesh.control.size()
        dist.gather_object(self._result(), every if self._mesh.rank == 0 else None, 0, self._mesh.control)
        files: dict[str, SavedFile] = {}

        def write_metadata() -> None:
            if errors := [f"rank {rank}: {one.error}" for rank, one in enumerate(every) if one.error]:
                raise OSError("; ".join(errors[:3]))
            self._plan.writer.finish(self._plan.metadata, [one.results for one in every])
            save_config(CheckpointingConfig(self._plan.backend, self._plan.version), str(self._folder))
            for one in every:
                files.update(one.files)
            files.update({name: _synced_record(self._folder / name) for name in (METADATA, _BACKEND_FILE)})

        on_rank_0(self._mesh, write_metadata)
        return files

    def _result(self) -> _Written:
        if self._report is None:
            return self._written
        with self._report as file:
            file.seek(0)
            data = file.read()
        if data:
            try:
                return pickle.loads(data)  # written by this process's own fork into a file without a name
            except (pickle.UnpicklingError, EOFError) as error:
                return _Written(error=f"the process that wrote did not finish its report ({error})")
        code = self._process.exitcode if self._process else None
        return _Written(error=f"the process that wrote ended with status {code} before it was done")


def _write_and_report(writer: FileSystemWriterAsync, buckets: list[Any], report: IO[bytes]) -> None:
    """What the forked process does."""
    os.nice(_NICENESS)
    pickle.dump(_write(writer, buckets), report)
    report.flush()


def _write(writer: FileSystemWriterAsync, buckets: list[Any]) -> _Written:
    written = _Written()
    for index, bucket in enumerate(buckets):
        path = Path(bucket[0])
        try:
            outcome: Any = writer.write_preloaded_data([writer.transforms], index, bucket, None, None, use_fsync=True)
            results = outcome[1]
            if isinstance(results, Exception):
                raise results
            written.results += results
            written.files[path.name] = _synced_record(path)
        except Exception as error:
            return _Written(error=f"{path}: {_first_cause(error)}")
    return written


def _first_cause(error: BaseException) -> BaseException:
    """The system's error where there is one: torch says of a full disk only that its position is unexpected."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _synced_record(path: Path) -> SavedFile:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    record = record_file(path)
    return SavedFile(bytes=record.bytes, sha256=record.sha256)


@contextmanager
def _no_manager_process() -> Iterator[None]:
    """Within: megatron takes its queue for results, which is not used here, for started."""
    before = filesystem_async._results_queue
    filesystem_async._results_queue = queue.SimpleQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before
