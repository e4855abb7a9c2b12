"""The servers' routes (R3) of each group, as files beside the journal: they are many times larger than the tokens."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minpro_megatron.records import CollectedGroup
from minpro_megatron.rollout.journal_file import JournalError

FOLDER = "routes"
_DTYPES = ("|u1", "<i2")


class RouteFiles:
    """`run_dir/routes/<group id>.bin`: the arrays of a group's responses, one after the other."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = Path(run_dir) / FOLDER

    def _path(self, group_id: int) -> Path:
        return self._folder / f"{group_id}.bin"

    def write(self, group: CollectedGroup) -> list[str | None]:
        """Writes the group's routes. Returns for each response where its array lies, as JSON for the journal. Raises
        JournalError."""
        arrays = [response.routed_experts for response in group.responses]
        if all(array is None for array in arrays):
            return [None] * len(arrays)
        path = self._path(group.issued.group_id)
        try:
            self._folder.mkdir(exist_ok=True)
            places = _write(path, arrays)
        except OSError as error:
            raise JournalError(f"{path}: {error.strerror}; free some space if the disk is full") from error
        return places

    def read(self, group_id: int, place: dict[str, Any]) -> np.ndarray:
        """The array at `place`. Raises JournalError if the file is missing or has other bytes."""
        path, dtype, shape = self._path(group_id), place["dtype"], place["shape"]
        if dtype not in _DTYPES:
            raise JournalError(f"{path}: routes of dtype {dtype!r}; known: {', '.join(_DTYPES)}")
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        try:
            with path.open("rb") as file:
                file.seek(place["offset"])
                data = file.read(size)
        except OSError as error:
            raise JournalError(f"{path}: routes of group {group_id} cannot be read ({error.strerror})") from None
        if hashlib.sha256(data).hexdigest() != place["sha256"]:
            raise JournalError(
                f"{path}: the routes of group {group_id} are damaged (their checksum differs); put the file back, "
                "or give a new run name"
            )
        return np.frombuffer(data, dtype=dtype).reshape(shape)

    def remove(self, group_ids: Iterable[int]) -> None:
        for group_id in group_ids:
            self._path(group_id).unlink(missing_ok=True)


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
        os.fsync(file.fileno())  # before the journal says that they are there
    return places
