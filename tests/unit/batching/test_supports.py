"""Every slot gets the kept ids of its own label, whatever the mesh; arrays that do not fit are refused."""

import re
from dataclasses import replace

import numpy as np
import pytest

from minpro_megatron.batching.supports import (
    RowSupports,
    joined_supports,
    refuse_missing_supports,
    shard_supports,
    sizes_and_ids,
    support_array,
    support_problem,
)
from minpro_megatron.batching.token_sequence import TokenSequence
from tests.support.numbered_sequences import SIZES, all_shards, numbered_sequences


def kept_of(token_id: int) -> list[int]:
    """Ids that tell the token, in an order of their own, and of different numbers."""
    return [*(token_id + 1000 * place for place in range(1, 1 + token_id % 5)), token_id]


def with_kept_ids(sequences: list[TokenSequence]) -> list[TokenSequence]:
    """Every seventh token that is not trained on is given, and keeps none."""
    found = []
    for one in sequences:
        given = (one.loss_mask == 0) & (one.response_ids % 7 == 0)
        kept = [
            [] if is_given else kept_of(int(token)) for token, is_given in zip(one.response_ids, given, strict=True)
        ]
        ids = np.array([id_ for of_token in kept for id_ in of_token])
        found.append(replace(one, supports=support_array(np.array([len(of_token) for of_token in kept]), ids)))
    return found


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_slot_has_the_kept_ids_of_its_label(sizes: tuple[int, int]) -> None:
    sequences = with_kept_ids(numbered_sequences(seed=3, count=9))
    responses = {int(token) for one in sequences for token in one.response_ids}
    seen = set()
    for (_, tensor_rank), shard in all_shards(sequences, *sizes, extra=1).items():
        supports = shard_supports(shard)
        assert support_problem(supports, shard, 10**6) is None
        slots = np.split(supports.ids, np.cumsum(supports.sizes_S)[:-1])
        for label, has_label, ids in zip(shard.label_ids_S, shard.response_index_S >= 0, slots, strict=True):
            if not len(ids):
                assert not has_label or label % 7 == 0
                continue
            assert ids.tolist() == kept_of(int(label))
            seen.add(int(label))
        assert tensor_rank or seen
    assert {token for token in responses if token % 7} <= seen <= responses


def test_a_row_without_sequences_keeps_nothing() -> None:
    (shard,) = all_shards([], 1, 1, extra=2).values()
    assert shard_supports(shard).ids.tolist() == []


def test_parts_are_joined_and_given_ones_keep_nothing() -> None:
    first, last = support_array(np.array([2, 1]), np.array([5, 6, 7])), support_array(np.array([1]), np.array([8]))
    joined = joined_supports([(2, first), (3, None), (1, last)])
    assert joined is not None
    sizes, ids = sizes_and_ids(joined, 6)
    assert (sizes.tolist(), ids.tolist()) == ([2, 1, 0, 0, 0, 1], [5, 6, 7, 8])
    assert joined_supports([(2, None), (3, None)]) is None


@pytest.mark.parametrize("wrong", [np.array([1, 1, 5]), np.array([2, -1, 5]), np.array([1]), np.array([1, 1, 5, 6, 7])])
def test_an_array_of_another_response_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="the kept ids of a response of 2 tokens are those of another one"):
        sizes_and_ids(wrong.astype(np.int32), 2)


def test_missing_supports_are_counted() -> None:
    sequences = with_kept_ids(numbered_sequences(seed=3, count=3))
    refuse_missing_supports(sequences, 20)
    message = "sampling.top_k = 20: 1 of 3 responses have no kept ids: they were sampled without sampling.top_k, or"
    with pytest.raises(ValueError, match=re.escape(message)):
        refuse_missing_supports([*sequences[:2], replace(sequences[2], supports=None)], 20)


def test_a_trained_token_must_be_among_its_kept_ids_and_these_in_the_vocabulary() -> None:
    sequences = with_kept_ids(numbered_sequences(seed=3, count=3))
    (shard,) = all_shards(sequences, 1, 1).values()
    sizes_S, ids = shard_supports(shard)
    trained = int(np.flatnonzero(shard.is_trained_S)[0])
    label = int(shard.label_ids_S[trained])
    assert support_problem(RowSupports(sizes_S, np.where(ids == label, 0, ids)), shard, 10**6) is not None
    none = np.where(np.arange(len(sizes_S)) == trained, 0, sizes_S)
    kept = np.repeat(np.arange(len(sizes_S)), sizes_S) != trained
    assert support_problem(RowSupports(none, ids[kept]), shard, 10**6) == "a sampled token is not among its kept ids"
    assert support_problem(RowSupports(sizes_S, ids), shard, int(ids.max())) is not None


@pytest.mark.parametrize(("kept", "is_wrong"), [([8, 9], True), ([], False), ([8, 6], False)], ids=str)
def test_a_masked_token_must_be_among_the_ids_it_keeps(kept: list[int], is_wrong: bool) -> None:
    """A label outside its softmax makes the whole gradient NaN, also where the loss multiplies it by 0."""
    (sequence,) = numbered_sequences(seed=3, count=1)
    supports = support_array(np.array([1, len(kept), 1]), np.array([5, *kept, 7]))
    masked = replace(
        sequence,
        response_ids=np.array([5, 6, 7], np.int32),
        behavior_log_probs=np.zeros(3, np.float32),
        rollout_log_probs=np.zeros(3, np.float32),
        loss_mask=np.array([1, 0, 1], np.float32),
        supports=supports,
    )
    (shard,) = all_shards([masked], 1, 1).values()
    problem = support_problem(shard_supports(shard), shard, 10**6)
    assert problem == ("a sampled token is not among its kept ids" if is_wrong else None)
