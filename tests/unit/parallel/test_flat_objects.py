"""What one rank flattens another one gets back, with arrays that share one block of memory."""

from typing import Any

import numpy as np
import pytest

from minpro_megatron.parallel.flat_objects import flattened, unflattened
from minpro_megatron.records import encode
from tests.support.batches import make_batch


def arrays() -> list[np.ndarray]:
    whole = np.arange(24, dtype=np.int32).reshape(4, 6)
    return [whole, whole[:, ::2], np.asfortranarray(whole), np.empty((0, 3), np.float32), np.ones(5, np.uint8)]


@pytest.mark.parametrize("value", [None, "", {"a": [1, (2.5, "b")]}, [b"bytes" * 100]])
def test_objects_without_arrays(value: Any) -> None:
    assert unflattened(flattened(value)) == value


def test_arrays_of_every_layout() -> None:
    flat = flattened({"arrays": arrays(), "name": "n"})
    found = unflattened(flat)
    assert found["name"] == "n"
    for array, expected in zip(found["arrays"], arrays(), strict=True):
        np.testing.assert_array_equal(array, expected, strict=True)
        assert array.flags.aligned
    assert np.shares_memory(found["arrays"][0], flat)


def test_a_read_only_array_is_flattened_too() -> None:
    """A decoded record's arrays are views of the bytes that were received."""
    array = np.frombuffer(bytes(range(8)), np.int32)
    assert unflattened(flattened(array)).tolist() == array.tolist()


def test_a_batch() -> None:
    batch = make_batch()
    assert encode(unflattened(flattened(batch))) == encode(batch)
