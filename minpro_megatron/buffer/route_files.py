"""The servers' routes (R3) and kept ids of each group, stored as files next to the journal because they far exceed the
tokens."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from msgspec.structs import replace

from minpro_megatron.batching.stored_arrays import read_array
from minpro_megatron.buffer.journal_errors import JournalError, explained
from minpro_megatron.records import CollectedGroup, Response, StoredArray

FOLDER = "routes"


class Places(NamedTuple):
    """Where the arrays of a response are in its group's file, as JSON for the journal; None if it has none."""

    routes: str | None = None
    supports: str | None = None


class RouteFiles:
    """`run_dir/routes/<group id>.bin`: the arrays of a group's responses, one after the other."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = Path(run_dir) / FOLDER

    def _path(self, group_id: int) -> Path:
        return self._folder / f"{group_id}.bin"

    def write(self, group: CollectedGroup) -> list[Places]:
        """Writes the arrays of the group. Returns the places of each response's. Raises JournalError."""
        if all(one.routed_experts is None and one.supports is None for one in group.responses):
            return [Places()] * len(group.responses)
        path = self._path(group.issued.group_id)
        try:
            self._folder.mkdir(exist_ok=True)
            places = _write(path, group.responses)
        except OSError as error:
            raise JournalError(explained(path, error)) from error
        return places

    def without_arrays(self, group: CollectedGroup, places: Sequence[Places]) -> CollectedGroup:
        """The group with `places`, which `write` returned, instead of its arrays."""
        group_id = group.issued.group_id
        responses = [
            replace(
                response,
                routed_experts=None,
                stored_routes=self._stored(group_id, own.routes),
                supports=None,
                stored_supports=self._stored(group_id, own.supports),
            )
            for response, own in zip(group.responses, places, strict=True)
        ]
        return replace(group, responses=responses)

    def verified(self, group_id: int, place: str | None, what: str = "routes") -> StoredArray | None:
        """`place` as a record for the trainer's ranks, after the array has been read and checked. Raises JournalError,
        in which `what` names the array, if the file is missing or its bytes differ."""
        stored = self._stored(group_id, place)
        if stored is not None:
            try:
                read_array(stored, what)
            except ValueError as error:
                raise JournalError(str(error)) from None
        return stored

    def _stored(self, group_id: int, place: str | None) -> StoredArray | None:
        if place is None:
            return None
        found = json.loads(place)
        return StoredArray(**{**found, "path": str(self._path(group_id)), "shape": tuple(found["shape"])})

    def remove(self, group_ids: Iterable[int]) -> None:
        for group_id in group_ids:
            self._path(group_id).unlink(missing_ok=True)

    def remove_others(self, group_ids: Iterable[int]) -> None:
        """Removes the files of all other groups, which a crash may have left."""
        kept = {self._path(group_id).name for group_id in group_ids}
        for path in self._folder.glob("*.bin"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _write(path: Path, responses: Sequence[Response]) -> list[Places]:
    with path.open("wb") as file:
        places = [Places(_append(file, one.routed_experts), _append(file, one.supports)) for one in responses]
        file.flush()
        os.fsync(file.fileno())  # before the journal records the files
    return places


def _append(file: BinaryIO, array: np.ndarray | None) -> str | None:
    if array is None:
        return None
    data = array.tobytes()
    place = {"offset": file.tell(), "shape": array.shape, "dtype": array.dtype.str}
    file.write(data)
    return json.dumps(place | {"sha256": hashlib.sha256(data).hexdigest()})
