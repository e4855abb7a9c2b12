"""The ranks that stand for all others, and how a rank's place is named."""

from typing import Any

import pytest

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.rehearsal.kinds import place_of, representatives


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ({}, [0]),
        ({"tensor": 2, "data": 4}, [0, 7]),  # the rank that gathers for publishing, and any other
        ({"tensor": 2, "pipeline": 4, "data": 2}, [0, 3, 8, 12]),  # first, middle and last stage
        ({"pipeline": 3, "pipeline_layers": [3, 2, 3]}, [0, 1, 2]),
    ],
    ids=str,
)
def test_one_rank_of_each_kind(degrees: dict[str, Any], expected: list[int]) -> None:
    assert representatives(ParallelConfig(**degrees)) == expected


def test_a_place_names_the_axes_with_several_ranks() -> None:
    parallel = ParallelConfig(tensor=2, context=2, data=2, pipeline=2, expert=4)
    assert place_of(parallel, 0) == "tensor 0/2, context 0/2, data 0/2, pipeline 0/2, expert 0/4"
    assert place_of(parallel, 13) == "tensor 1/2, context 0/2, data 1/2, pipeline 1/2, expert 1/4"
    assert place_of(ParallelConfig(), 0) == "the only rank"
