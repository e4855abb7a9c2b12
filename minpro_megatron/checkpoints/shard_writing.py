"""Writes a sharded state in Megatron's distributed checkpoint format, with checksums, synchronously or in the
background.

Megatron plans which rank writes what, and forks a process to write it (`TemporalAsyncCaller`). In between it starts a
manager process for the results, which takes seconds and outlives a killed rank. In its finalization a full disk on
rank 0 leaves the other ranks waiting. This file replaces both: results are returned through an unnamed file, and after
every operation that can fail on one rank all ranks know whether it failed.

Memory: a background save copies what the rank writes to host memory once, in a few large blocks. A synchronous save
writes host memory directly and copies GPU memory one tensor at a time. Megatron's own writer copies every view while it
plans.
"""

import gc
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from minpro_megatron.checkpoints.file_records import record_file
from minpro_megatron.checkpoints.manifest import METADATA, FileRecord
from minpro_megatron.checkpoints.shard_coverage import incompleteness
from minpro_megatron.errors import ProjectError, RunFailed, UserError
from minpro_megatron.host_memory.host_blocks import host_tensors
from minpro_megatron.parallel.mesh import Mesh

_BACKEND_FILE = "metadata.json"
_NICENESS = 10  # of the writing process: training has priority


class SaveError(ProjectError):
    """A checkpoint could not be written. Raised on all ranks."""


def on_rank_0[T](mesh: Mesh, action: Callable[[], T]) -> T:
    """Calls `action` on rank 0 and returns its result on all ranks. Collective. An error of `action` is raised on all
    ranks: UserError or RunFailed, or SaveError for an OSError."""
    value: T | None = None
    error: UserError | RunFailed | SaveError | None = None
    if mesh.rank == 0:
        try:
            value = action()
        except OSError as found:
            error = SaveError(str(found))
        except (UserError, RunFailed) as found:
            error = found
    value, error = mesh.from_rank_0((value, error))
    if error is not None:
        raise error
    return cast(T, value)


@dataclass
class _Written:
    """What a rank wrote, or the error."""

    results: list[Any] = field(default_factory=list)  # torch's WriteResult of every tensor and object
    files: dict[str, FileRecord] = field(default_factory=dict)
    error: str | None = None


class _Tensors:
    """The tensors of a file, contiguous, each with its item of the plan. Iteration yields them in host memory; tensors
    on a GPU are copied one at a time."""

    def __init__(self, items: Sequence[WriteItem], tensors: Sequence[Tensor]) -> None:
        self._items = items
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[WriteItem, Tensor]]:
        for item, tensor in zip(self._items, self._tensors, strict=True):
            yield item, _alone(tensor.cpu())

    def on_host(self) -> "_Tensors":
        """A copy of the current values in host memory."""
        copies = host_tensors(self._tensors)
        for copy, tensor in zip(copies, self._tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        return _Tensors(self._items, copies)


def _alone(tensor: Tensor) -> Tensor:
    """The same memory as a tensor with its own storage: torch.save writes the whole storage of a view."""
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


@dataclass(frozen=True)
class _File:
    """The content of a rank's file."""

    path: Path
    objects: list[tuple[WriteItem, Any]]  # and their bytes
    tensors: _Tensors


class _Writer(FileSystemWriterAsync):
    """Megatron's writer, without the copies that it makes while it plans."""

    file: _File | None = None  # nothing to write

    def prepare_write_data(self, plan: Any, planner: Any) -> None:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        objects = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        if plan.items:
            self.file = _File(
                Path(self.checkpoint_dir, name),
                [(item, planner.resolve_data(item)) for item in objects],
                _Tensors(tensors, [planner.resolve_data(item) for item in tensors]),
            )


class _Planner(MCoreSavePlanner):
    """Megatron's planner with another check. Torch's check compares every two parts of a tensor: this would take
    minutes per save, because all experts' weights of all layers are one tensor."""

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            if isinstance(tensor, TensorStorageMetadata) and (found := incompleteness(tensor.size, tensor.chunks)):
                raise UserError(f"{name}: {found}")
        return plans, metadata


class _Planned(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where every rank knows what to write."""

    writer: _Writer
    metadata: Any  # on rank 0: the location of every part of every tensor

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, async_strategy: str = "mcore") -> Any:
        own, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        self.writer = _Writer(checkpoint_dir)
        planner = _Planner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
        planned = save_state_dict_async_plan(mcore_to_pyt_state_dict(own), self.writer, None, 0, planner=planner)
        self.metadata = planned[0][1]
        return AsyncRequest(None, (), [])


class ShardWrite:
    """One save of a sharded state. Every method is collective."""

    def __init__(self, state: dict[str, Any], folder: Path, mesh: Mesh, in_background: bool) -> None:
        """Starts to write `state` into the empty `folder`; a background save writes its current values."""
        self._folder = folder
        self._mesh = mesh
        self._plan = _Planned()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # the planner checks that the parts cover every tensor; Megatron's own check expects equal parts
            dist_checkpointing.save(
                state,
                str(folder),
                self._plan,
                validate_access_integrity=False,
                async_sharded_save=True,
                async_strategy="mcore",
            )
        self._caller = TemporalAsyncCaller()
        self._process: Any = None
        self._report: IO[bytes] | None = None
        self._written = _Written()  # until the background process reports
        self._copied: _File | None = None  # what the background process writes
        file, self._plan.writer.file = self._plan.writer.file, None
        if file is not None and in_background:
            self._start_process(self._plan.writer, file)
        elif file is not None:
            self._written = _write(self._plan.writer, file)

    def _start_process(self, writer: _Writer, file: _File) -> None:
        # Training continues and changes the tensors, so the process writes a copy. This process keeps the copy until
        # everything is written: pinned memory that it frees could be reused at once.
        try:
            self._report = tempfile.TemporaryFile()  # noqa: SIM115  `_result` closes it
            self._copied = _File(file.path, file.objects, file.tensors.on_host())
            request = AsyncRequest(_write_and_report, (writer, self._copied, self._report), [])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings of threads that the child does not have; it only writes
                self._caller.schedule_async_call(request)
        except (
            OSError,
            RuntimeError,
        ) as error:  # out of memory, a RuntimeError in torch; `complete` reports it to the other ranks
            self._caller = TemporalAsyncCaller()  # the previous one would wait for a process that was never started
            self._report, self._written = None, _Written(error=f"the process that writes cannot be started: {error}")
            self._copied = None
        self._process = self._caller.process

    def is_done(self, wait: bool) -> bool:
        """Whether all ranks have written; with `wait`, once they have."""
        return self._caller.is_current_async_call_done(blocking=wait)

    def complete(self) -> dict[str, FileRecord]:
        """After `is_done`: write the metadata. Returns the folder's files on rank 0, an empty dict on other ranks.

        Raises SaveError on all ranks if any of them could not write.
        """
        self._copied = None
        every: list[_Written] = [_Written()] * self._mesh.control.size()
        dist.gather_object(self._result(), every if self._mesh.rank == 0 else None, 0, self._mesh.control)
        files: dict[str, FileRecord] = {}

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
                return pickle.loads(data)  # written by a fork of this process into an unnamed file
            except (pickle.UnpicklingError, EOFError) as error:
                return _Written(error=f"the process that wrote did not finish its report ({error})")
        code = self._process.exitcode if self._process else None
        return _Written(error=f"the process that wrote ended with status {code} before it was done")


def _write_and_report(writer: _Writer, file: _File, report: IO[bytes]) -> None:
    """Runs in the forked process."""
    gc.disable()  # a garbage collection writes into every object, which copies the object's memory page
    os.nice(_NICENESS)
    pickle.dump(_write(writer, file), report)
    report.flush()


def _write(writer: _Writer, file: _File) -> _Written:
    path = file.path
    try:
        bucket: Any = (str(path), path.name, (file.objects, file.tensors))
        outcome: Any = writer.write_preloaded_data([writer.transforms], 0, bucket, None, None, use_fsync=True)
        results = outcome[1]
        if isinstance(results, Exception):
            raise results
        return _Written(results, {path.name: _synced_record(path)})
    except Exception as error:
        return _Written(error=f"{path}: {_first_cause(error)}")


def _first_cause(error: BaseException) -> BaseException:
    """The operating system's error if there is one: for a full disk torch reports only an unexpected position."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _synced_record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return record_file(path)
