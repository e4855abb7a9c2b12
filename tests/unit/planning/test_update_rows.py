"""The planner counts the rows that the trainer would compute."""

import pytest

from minpro_megatron.actor.flops import forward_flops
from minpro_megatron.models.known_models.find import find_architecture
from minpro_megatron.planning.update_rows import UpdateRows, update_rows
from tests.support.planned_runs import run_to_plan

MIXTURE, DENSE = "qwen3-30b-a3b", "qwen3-8b"


def rows_of(lengths: list[int], model: str = DENSE, row_tokens: int = 9216, **degrees: int) -> UpdateRows:
    parallel = {"tensor": 1, "context": 1, "expert": 1, "data": 1} | degrees
    config = run_to_plan(model={"hf_path": model}, parallel=parallel, batch={"max_tokens_per_row": row_tokens})
    return update_rows(config, find_architecture(model), lengths)


def test_equal_sequences_divide_evenly() -> None:
    assert rows_of([4608] * 16, tensor=2, context=2, data=4) == UpdateRows(2, 0.0)


def test_a_rank_without_a_sequence_still_computes_a_row_of_padding() -> None:
    """Three sequences on two ranks: one rank has two of them, which is a third more than an even division."""
    found = rows_of([9216] * 3, data=2)
    assert found.micro_batches == 2
    assert found.surplus == pytest.approx(1 / 3)


def test_ranks_that_share_experts_wait_for_each_other_in_every_row() -> None:
    lengths = [9000, 9000, 9000, 300]
    cost = forward_flops(find_architecture(MIXTURE)).of
    even = (3 * cost(9000) + cost(300)) / 2
    found = rows_of(lengths, MIXTURE, expert=2, data=2)
    assert found.surplus == pytest.approx(2 * cost(9000) / even - 1)


def test_a_sequence_is_padded_to_what_the_ranks_can_divide() -> None:
    cost = forward_flops(find_architecture(DENSE)).of
    found = rows_of([501], context=2)
    assert found.surplus == pytest.approx(cost(504) / cost(501) - 1)
