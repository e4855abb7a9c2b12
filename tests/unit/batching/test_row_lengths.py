"""A row is padded to the smallest length that every rank of the mesh can divide."""

from minpro_megatron.batching.row_lengths import padded_length, row_length
from tests.support.numbered_sequences import numbered_sequences


def test_rows_are_padded_to_a_length_that_every_mesh_can_divide() -> None:
    assert row_length([7, 5], 1, 1) == 12
    assert row_length([7, 5], 1, 8) == 16
    assert row_length([], 2, 2) == 8
    assert padded_length(numbered_sequences(0, 1)[0], 4) % 8 == 0
