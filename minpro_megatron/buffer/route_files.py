"""The servers' routes (R3) of each group, stored as files next to the journal because they far exceed the tokens."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from minpro_megatron.batching.stored_routes import read_routes
from minpro_megatron.buffer.journal_errors import JournalError, explained
from minpro_megatron.records import CollectedGroup, StoredRoutes

FOLDER = "routes"


class RouteFiles:
    """`run_dir/routes/<group id>.bin`: the arrays of a group's responses, one after the other."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = Path(run_dir) / FOLDER

    def _path(self, group_id: int) -> Path:
        return self._folder / f"{group_id}.bin"

    def write(self, group: CollectedGroup) -> list[str | None]:
        """Writes the group's routes. Returns the location of each response's array, as JSON for the journal. Raises
        JournalError."""
        arrays = [response.routed_experts for response in group.responses]
        if all(array is None for array in arrays):
            return [None] * len(arrays)
        path = self._path(group.issued.group_id)
        try:
            self._folder.mkdir(exist_ok=True)
            places = _write(path, arrays)
        except OSError as error:
            raise JournalError(explained(path, error)) from error
        return places

    def without_arrays(self, group: CollectedGroup, places: Sequence[str | None]) -> CollectedGroup:
        """The group with `places`, which `write` returned, instead of its routes."""
        group_id = group.issued.group_id
        responses = [
            response
            if place is None
            else replace(response, routed_experts=None, stored_routes=self.stored(group_id, json.loads(place)))
            for response, place in zip(group.responses, places, strict=True)
        ]
        return replace(group, responses=responses)

    def read(self, group_id: int, place: Mapping[str, Any]) -> np.ndarray:
        """The array at `place`. Raises JournalError if the file is missing or its bytes differ."""
        try:
            return read_routes(self.stored(group_id, place))
        except ValueError as error:
            raise JournalError(str(error)) from None

    def stored(self, group_id: int, place: Mapping[str, Any]) -> StoredRoutes:
        """`place` as a record for the trainer's ranks."""
        return StoredRoutes(**{**place, "path": str(self._path(group_id)), "shape": tuple(place["shape"])})

    def verified(self, group_id: int, place: Mapping[str, Any]) -> StoredRoutes:
        """As `stored`, after the array has been read and checked. Raises JournalError as `read` does."""
        self.read(group_id, place)
        return self.stored(group_id, place)

    def remove(self, group_ids: Iterable[int]) -> None:
        for group_id in group_ids:
            self._path(group_id).unlink(missing_ok=True)

    def remove_others(self, group_ids: Iterable[int]) -> None:
        """Removes the files of all other groups, which a crash may have left."""
        kept = {self._path(group_id).name for group_id in group_ids}
        for path in self._folder.glob("*.bin"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _write(path: Path, arrays: Sequence[np.ndarray | None]) -> list[str | None]:
    places: list[str | None] = []
    with path.open("wb") as file:
        for array in arrays:
            if array is None:
                places.append(None)
                continue
            data = array.tobytes()
            place = {"offset": file.tell(), "shape": array.shape, "dtype": array.dtype.str}
            places.append(json.dumps(place | {"sha256": hashlib.sha256(data).hexdigest()}))
            file.write(data)
        file.flush()
        os.fsync(file.fileno())  # before the journal records the files
    return places
