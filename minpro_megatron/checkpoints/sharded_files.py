"""Writes and reads Megatron's distributed checkpoint format (`torch_dist`) one piece at a time, in bounded memory.

megatron-core saves what its ranks hold, so conversion with it needs the whole model in memory. The format itself is
torch.distributed.checkpoint's: `.distcp` files of tensors, each as torch.save writes it, and `.metadata`, a pickle with
the location of every part of every global tensor. All layers' parameters of one kind are one global tensor, with the
layer, and for experts the expert too, as leading dimensions.

Trust: `.metadata` is unpickled with only the classes listed here, and everything else with `weights_only`. The loader
of torch.distributed.checkpoint, which Megatron calls, unpickles objects without such a list
(DefaultLoadPlanner.load_bytes). It is called for a folder only after the checks of file_records.py and refuse_code.
"""

import itertools
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import get_crc32_options, set_crc32_options

from minpro_megatron.checkpoints.file_records import FileRecords
from minpro_megatron.checkpoints.manifest import METADATA
from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.weights.table import Entry, Shape

_BACKEND = (
    '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}'  # metadata.json, as Megatron 0.19 writes it
)
_FILE_BYTES = 1 << 30  # a file that has reached this size is closed
_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Place:
    """The part of a global tensor that a parameter is: `index` in the leading dimensions of `sizes`."""

    key: str
    index: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def state_object(self) -> str | None:
        """The key of the (empty) extra state that Megatron expects for every linear layer's weight."""
        *_, module, parameter = self.key.split(".")
        if not module.startswith("linear_") or parameter != "weight":
            return None
        at, of = (".".join(map(str, numbers)) for numbers in (self.index or (0,), self.sizes or (1,)))
        return f"{self.key.removesuffix('weight')}_extra_state/shard_{at}_{of}"


def place(entry: Entry, architecture: Architecture) -> Place:
    """The place of the entry's parameter in megatron-core's checkpoints."""
    if entry.layer is None:
        return Place(entry.megatron, (), ())
    key, index, sizes = entry.megatron, (entry.layer,), (architecture.num_layers,)
    if architecture.dense_layers:  # the layers differ, so each has tensors of its own
        index, sizes = (), ()
    else:
        key = re.sub(r"^decoder\.layers\.\d+\.", "decoder.layers.", key)
    if entry.expert is None:
        return Place(key, index, sizes)
    key = re.sub(r"\.local_experts\.\d+\.", ".experts.", key)
    return Place(key, (*index, entry.expert), (*sizes, architecture.num_experts))


class ShardedWriter:
    """Writes parameters into a folder, in any order and by any ranges of rows, and the metadata at the end."""

    def __init__(self, folder: Path, records: FileRecords) -> None:
        self._folder = folder
        self._records = records
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}
        self._stored: dict[MetadataIndex, _StorageInfo] = {}
        self._files = 0
        self._stream: Any = None
        self._file_name = ""
        self._next_file()
        self._object("common_state/shard_0_1", self._save([{}]))
        self._no_state = self._save([None])  # one for all linear layers
        self._next_file()

    def write(self, where: Place, full_shape: Shape, first_row: int, rows: Tensor) -> None:
        """Write `rows`, which start at row `first_row` of the parameter at `where` with shape `full_shape`."""
        if self._stream.tell() >= _FILE_BYTES:
            self._next_file()
        offsets = torch.Size((*where.index, first_row, *(0 for _ in full_shape[1:])))
        sizes = torch.Size((*(1 for _ in where.index), *rows.shape))
        tensor = self._tensors.get(where.key)
        if tensor is None:
            size = torch.Size((*where.sizes, *full_shape))
            properties = TensorProperties(dtype=rows.dtype)
            tensor = self._tensors[where.key] = TensorStorageMetadata(properties, size, [])
        place_in_tensor = MetadataIndex(where.key, offsets, len(tensor.chunks))
        tensor.chunks.append(ChunkStorageMetadata(offsets, sizes))
        # torch.save writes whole storages: rows of a larger storage are copied first
        alone = rows if rows.untyped_storage().nbytes() == rows.nbytes else rows.clone()
        self._stored[place_in_tensor] = self._save(alone.view(sizes))
        if where.state_object and first_row == 0:
            self._object(where.state_object, self._no_state)

    def finish(self) -> None:
        """Write the metadata, after which the folder can be loaded."""
        self._close()
        metadata = Metadata(
            state_dict_metadata={**self._tensors, **self._objects},
            storage_data=self._stored,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )
        (self._folder / "metadata.json").write_text(_BACKEND)
        with (self._folder / METADATA).open("wb") as file:
            pickle.dump(metadata, file)
        self._records.add("metadata.json")
        self._records.add(METADATA)

    def _object(self, key: str, stored: _StorageInfo) -> None:
        self._objects[key] = BytesStorageMetadata()
        self._stored[MetadataIndex(key)] = stored

    def _save(self, value: Any) -> _StorageInfo:
        start = self._stream.tell()
        with _without_crc32():
            torch.save(value, self._stream)
        return _StorageInfo(self._file_name, start, self._stream.tell() - start)

    def _next_file(self) -> None:
        self._close()
        self._file_name = f"__0_{self._files}.distcp"
        self._files += 1
        self._stream = self._records.create(self._file_name)

    def _close(self) -> None:
        if self._file_name:
            self._records.close(self._file_name)


@contextmanager
def _without_crc32() -> Iterator[None]:
    """The manifest has a stronger checksum of the whole file, and torch does not check this one when loading."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


@dataclass(frozen=True)
class _Chunk:
    first: int  # first row in the parameter
    offsets: tuple[int, ...]  # in the parameter's other dimensions
    lead: tuple[int, ...]  # index in the chunk's leading dimensions
    sizes: tuple[int, ...]  # the chunk's own, without leading dimensions
    stored: _StorageInfo


class ShardedReader:
    """Reads parameters from a folder by rows, for any mesh that saved it. Caches at most 256 MB of the last reads."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._metadata = read_metadata(self._folder)
        self._chunks: dict[tuple[str, tuple[int, ...]], list[_Chunk]] = {}
        self._indexed: set[str] = set()
        self._cache: OrderedDict[tuple[str, int], Tensor] = OrderedDict()
        self._cached_bytes = 0

    def check(self, where: Place, full_shape: Shape, dtype: torch.dtype) -> None:
        """Raises ValueError if the folder has no such parameter."""
        found = self._metadata.state_dict_metadata.get(where.key)
        if not isinstance(found, TensorStorageMetadata):
            raise UserError(f"{self._folder}: there is no {where.key}; convert again")
        expected = (*where.sizes, *full_shape)
        if tuple(found.size) != expected or found.properties.dtype != dtype:
            raise UserError(
                f"{self._folder}: {where.key} is {found.properties.dtype} {tuple(found.size)}, but the manifest "
                f"requires {dtype} {expected}; convert again"
            )

    def read_rows(self, where: Place, full_shape: Shape, first: int, count: int) -> Tensor:
        """Rows `first` .. `first + count` of the parameter, [count, ...]; must not be written to.

        Raises ValueError if a part of them is missing in the folder's files.
        """
        end = first + count
        chunks = [chunk for chunk in self._of(where) if chunk.first < end and first < chunk.first + chunk.sizes[0]]
        for chunk in chunks[:1]:
            if chunk.first <= first and end <= chunk.first + chunk.sizes[0] and chunk.sizes[1:] == full_shape[1:]:
                return self._load(chunk)[first - chunk.first :][:count]
        rows, filled = None, 0
        for chunk in chunks:
            data = self._load(chunk)
            rows = data.new_empty(count, *full_shape[1:]) if rows is None else rows
            begin, stop = max(first, chunk.first), min(end, chunk.first + chunk.sizes[0])
            target = rows[begin - first : stop - first]
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes[1:], strict=True), start=1):
                target = target.narrow(dim, offset, size)
            target.copy_(data[begin - chunk.first : stop - chunk.first])
            filled += target.numel()
        if rows is None or filled != rows.numel():
            raise UserError(f"{self._folder}: {where.key} {where.index} is not complete; convert again")
        return rows

    def _of(self, where: Place) -> Sequence[_Chunk]:
        if where.key not in self._indexed:
            self._index(where.key, len(where.index))
            self._indexed.add(where.key)
        return self._chunks.get((where.key, where.index), ())

    def _index(self, key: str, num_leading: int) -> None:
        """List the tensor's chunks by the layer (and expert) that they belong to."""
        for chunk in self._metadata.state_dict_metadata[key].chunks:  # type: ignore[union-attr]
            stored = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            for lead in itertools.product(*(range(size) for size in chunk.sizes[:num_leading])):
                index = tuple(offset + at for offset, at in zip(chunk.offsets, lead, strict=False))
                rest, sizes = chunk.offsets[num_leading:], tuple(chunk.sizes[num_leading:])
                self._chunks.setdefault((key, index), []).append(_Chunk(rest[0], tuple(rest[1:]), lead, sizes, stored))

    def _load(self, chunk: _Chunk) -> Tensor:
        """The part of a stored tensor that belongs to one layer (and expert)."""
        key = (chunk.stored.relative_path, chunk.stored.offset)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key][chunk.lead]
        with (self._folder / chunk.stored.relative_path).open("rb") as file:
            view: Any = _create_file_view(file, chunk.stored.offset, chunk.stored.length)
            tensor = torch.load(view, map_location="cpu", weights_only=True)
        self._cache[key] = tensor
        self._cached_bytes += tensor.nbytes
        while len(self._cache) > 1 and self._cached_bytes > _CACHE_BYTES:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return tensor[chunk.lead]


def refuse_code(folder: Path) -> None:
    """Raises ValueError if unpickling the folder's metadata or any of its objects would do more than create data.

    Every object is read once, and only numbers, texts, containers and tensors are allowed; tensors are not read.
    """
    metadata, checked = read_metadata(folder), set[tuple[str, int]]()
    for place, stored in metadata.storage_data.items():
        if not isinstance(metadata.state_dict_metadata.get(place.fqn), BytesStorageMetadata):
            continue
        file = folder / stored.relative_path
        if (stored.relative_path, stored.offset) in checked:
            continue
        checked.add((stored.relative_path, stored.offset))
        if file.resolve().parent != folder.resolve():
            raise UserError(f"{folder / METADATA}: {stored.relative_path!r} is not a file of this folder")
        try:
            with file.open("rb") as opened:
                view: Any = _create_file_view(opened, stored.offset, stored.length)
                torch.load(view, map_location="cpu", weights_only=True)
        except Exception as error:  # what a damaged pickle raises can be anything
            # from torch's message take only the name that is not allowed: torch also advises to load the file anyway
            named = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it names {named[1]}" if named else type(error).__name__
            raise UserError(
                f"{file}: the object {place.fqn!r} contains more than data, or is damaged, and is refused ({reason}); "
                "give a folder made by `minpro convert` or by a run"
            ) from None


_METADATA_CLASSES = {
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # from Python 3.13 on
    "torch": {"Size", "float32", "bfloat16", "float16", "float64", "int64", "uint8"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _METADATA_CLASSES.get(module_name, ()):
            raise ValueError(f"it names {module_name}.{global_name}, which checkpoint metadata never contains")
        return super().find_class(module_name, global_name)


def read_metadata(folder: Path) -> Metadata:
    """The folder's `.metadata`. Raises ValueError if it is missing or damaged, or would run code when unpickled."""
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except Exception as error:  # what a damaged pickle raises can be anything
        raise UserError(f"{path}: {error}; give a folder made by `minpro convert`") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}: this is not the metadata of a checkpoint; give a folder made by this tool")
    return metadata
