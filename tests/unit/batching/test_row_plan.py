"""Over all ranks, a plan's shards hold every trained token once, whatever the ranks' number and the kind of rows."""

from dataclasses import replace

import numpy as np
import pytest

from minpro_megatron.batching.packing import SequenceCost
from minpro_megatron.batching.row_plan import RowPlan
from minpro_megatron.batching.row_shard import RankSlice, RowShard
from minpro_megatron.batching.token_sequence import TokenSequence
from tests.support.numbered_sequences import SIZES, numbered_sequences

PLAN = RowPlan(
    RankSlice(1, 0, 1, 0), data_size=2, data_rank=0, multiple=4, max_tokens_per_row=48, packing=True,
    pads_counts=False, cost=SequenceCost(linear=1.0, quadratic=0.01),
)  # fmt: skip


def shards_of_all(plan: RowPlan, sequences: list[TokenSequence], places: list[RankSlice]) -> list[list[RowShard]]:
    """By data-parallel rank and place."""
    ranks = [replace(plan, place=place, data_rank=rank) for rank in range(plan.data_size) for place in places]
    return [rank.shards(sequences)[0] for rank in ranks]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_trained_token_is_on_one_rank(size: tuple[int, int], packing: bool) -> None:
    context, tensor = size
    places = [RankSlice(context, c, tensor, t) for c in range(context) for t in range(tensor)]
    sequences = numbered_sequences(seed=3, count=9)
    ranks = shards_of_all(replace(PLAN, packing=packing), sequences, places)
    found = [shard.flat_slot_L[shard.mask_L > 0] for shards in ranks for shard in shards]
    trained = [one.first_slot + np.flatnonzero(one.loss_mask > 0) for one in sequences]
    assert sorted(np.concatenate(found).tolist()) == sorted(np.concatenate(trained).tolist())
    assert {len(shards) for shards in ranks} == {len(ranks[0])}  # all ranks run as many micro-batches
    assert len(ranks[0]) * PLAN.data_size % PLAN.multiple == 0
    if not packing:
        assert all(len(shard.padded_lengths) == 1 for shards in ranks for shard in shards)


def test_without_some_sequences_the_other_rows_stay_as_they_are() -> None:
    sequences = numbered_sequences(seed=5, count=12)
    plan = replace(PLAN, data_size=1, multiple=1)
    whole = [shard.input_ids_S.tolist() for shard in plan.shards(sequences)[0]]
    wanted = [index == 7 for index in range(12)]
    (row,) = [shard.input_ids_S.tolist() for shard in plan.shards(sequences, wanted)[0]]
    assert row in whole
    assert int(sequences[7].response_ids[0]) in row


def test_padding_and_imbalance_are_those_of_all_ranks() -> None:
    sequences = numbered_sequences(seed=6, count=10)
    metrics = [replace(PLAN, data_rank=rank).shards(sequences)[1] for rank in range(2)]
    assert metrics[0] == metrics[1]
    computed = sum(
        len(shard.input_ids_S) for shards in shards_of_all(PLAN, sequences, [PLAN.place]) for shard in shards
    )
    fraction = metrics[0]["batch/padding_fraction"]
    assert (fraction.total, fraction.count) == (computed - sum(one.num_tokens for one in sequences), computed)


def test_the_number_of_sequences_in_a_row_becomes_a_power_of_two() -> None:
    sequences = numbered_sequences(seed=7, count=11)
    counts = [len(shard.padded_lengths) for shard in replace(PLAN, data_size=1, pads_counts=True).shards(sequences)[0]]
    assert max(counts) > 2
    assert all(count & (count - 1) == 0 for count in counts)
