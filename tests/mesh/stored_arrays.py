"""Routes and supports as the collector gives them: in a file, with their place in it and their checksum."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.records import StoredArray


def in_a_file(
    sequences: Sequence[TokenSequence], field: Literal["routed_experts", "supports"], path: Path
) -> list[TokenSequence]:
    """The sequences with this array of each in the file `path`."""
    stored = []
    with path.open("wb") as file:
        for sequence in sequences:
            array = getattr(sequence, field)
            assert isinstance(array, np.ndarray)
            place: Any = {"path": str(path), "offset": file.tell(), "shape": array.shape, "dtype": array.dtype.str}
            changed: Any = {field: StoredArray(sha256=hashlib.sha256(array.tobytes()).hexdigest(), **place)}
            stored.append(replace(sequence, **changed))
            file.write(array.tobytes())
    return stored
