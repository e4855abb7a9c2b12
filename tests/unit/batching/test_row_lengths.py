"""A row is padded to the smallest length that every rank of the mesh can divide."""

from minpro_megatron.batching.row_lengths import padded_length, padding_sequences, row_length
from tests.support.numbered_sequences import numbered_sequences


def test_rows_are_padded_to_a_length_that_every_mesh_can_divide() -> None:
    assert row_length([7, 5], 1, 1) == 12
    assert row_length([7, 5], 1, 8) == 16
    assert row_length([], 2, 2) == 8
    assert padded_length(numbered_sequences(0, 1)[0], 4) % 8 == 0


def test_sequences_of_padding_make_their_number_a_power_of_two() -> None:
    numbers = [num + len(padding_sequences(num, 1)) for num in range(34)]
    assert numbers == [0, 1, 2, 4, 4, 8, 8, 8, 8, *[16] * 8, *[32] * 16, 64]
    assert padding_sequences(3, 1) == [1]
    assert padding_sequences(5, 4) == [8, 8, 8]
