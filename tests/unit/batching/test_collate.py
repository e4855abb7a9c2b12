"""What all ranks hold of a packed row is the row, once; labels were shifted before the row was cut."""

import numpy as np
import pytest

from minpro_megatron.batching.collate import shard_row
from minpro_megatron.batching.row_lengths import padded_length, padding_sequences, row_length
from minpro_megatron.batching.row_shard import RankSlice
from minpro_megatron.batching.token_sequence import TokenSequence
from tests.support.numbered_sequences import SIZES, all_shards, numbered_sequences


def expected_slots(sequences: list[TokenSequence]) -> dict[int, dict[str, float]]:
    """For every token id but a sequence's last: what its slot must say about the token after it."""
    slots = {}
    for number, sequence in enumerate(sequences):
        ids = [*sequence.prompt_ids.tolist(), *sequence.response_ids.tolist()]
        trained = int(sequence.loss_mask.sum())
        for place, following in enumerate(ids[1:]):
            token = place + 1 - len(sequence.prompt_ids)  # of the response; negative: a prompt token
            said = {"label": following, "position": place, "sequence": number}
            if token >= 0:
                said["mask"] = sequence.loss_mask[token]
                said["sequence_weight"] = sequence.loss_mask[token] / trained if trained else 0.0
                said["behavior_log_probs"] = sequence.behavior_log_probs[token]
                said["rollout_log_probs"] = sequence.rollout_log_probs[token]
                said["advantages"] = sequence.advantage
                said["flat_slot"] = sequence.first_slot + token
            slots[ids[place]] = said
    return slots


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_all_shards_together_are_the_row_with_each_label_beside_its_predecessor(
    seed: int, sizes: tuple[int, int]
) -> None:
    sequences = numbered_sequences(seed, 5)
    shards = all_shards(sequences, *sizes, extra=seed)
    expected = expected_slots(sequences)
    last_tokens = {int(sequence.response_ids[-1]) for sequence in sequences}
    seen: list[int] = []
    for (_, tensor_rank), shard in shards.items():
        width = len(shard.mask_L)
        for slot in range(width):
            place = tensor_rank * width + slot  # in the context shard
            token = int(shard.input_ids_S[place])
            is_padding = shard.position_ids_S[place] >= sequences[shard.sequence_L[slot]].num_tokens
            seen += [] if is_padding else [token]
            said = {} if is_padding else expected.get(token, {})  # nothing follows a last token
            assert shard.label_ids_S[place] == said.get("label", 0)
            for name in ("mask", "sequence_weight", "behavior_log_probs", "rollout_log_probs", "advantages"):
                assert getattr(shard, f"{name}_L")[slot] == np.float32(said.get(name, 0.0)), name
            assert shard.flat_slot_L[slot] == said.get("flat_slot", -1)
            if said:
                assert shard.position_ids_S[place] == said["position"]
                assert shard.sequence_L[slot] == said["sequence"]
    assert sorted(seen) == sorted([*expected, *last_tokens])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_response_token_has_one_flat_slot(sizes: tuple[int, int]) -> None:
    sequences = numbered_sequences(7, 6)
    slots = np.concatenate([shard.flat_slot_L for shard in all_shards(sequences, *sizes).values()])
    total = sum(len(sequence.response_ids) for sequence in sequences)
    assert sorted(slots[slots >= 0].tolist()) == list(range(100, 100 + total))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_counts_are_equal_on_tensor_ranks_and_add_up_over_context_ranks(sizes: tuple[int, int]) -> None:
    context_size, tensor_size = sizes
    sequences = numbered_sequences(3, 6)
    shards = all_shards(sequences, *sizes, extra=1)
    for context_rank in range(context_size):
        ranks = [shards[context_rank, tensor_rank] for tensor_rank in range(tensor_size)]
        assert len({(shard.num_tokens, shard.num_sequences) for shard in ranks}) == 1
        assert ranks[0].num_tokens == sum(float(shard.mask_L.sum()) for shard in ranks)
    per_context = [shards[rank, 0] for rank in range(context_size)]
    assert sum(s.num_tokens for s in per_context) == sum(float(s.loss_mask.sum()) for s in sequences)
    assert sum(s.num_sequences for s in per_context) == sum(bool(s.loss_mask.any()) for s in sequences)
    weights = sum(float(shard.sequence_weight_L.sum()) for shard in shards.values())
    assert weights == pytest.approx(sum(s.num_sequences for s in per_context), rel=1e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_row_without_sequences_trains_on_nothing(sizes: tuple[int, int]) -> None:
    context_size, tensor_size = sizes
    for context_rank in range(context_size):
        shard = shard_row([], 48, RankSlice(context_size, context_rank, tensor_size, 0))
        assert shard.padded_lengths == [48]
        assert (shard.num_tokens, shard.num_sequences, float(shard.mask_L.sum())) == (0, 0, 0.0)
        assert set(shard.flat_slot_L.tolist()) == {-1}


def test_positions_start_again_with_every_sequence_and_run_on_into_the_rows_padding() -> None:
    sequences = numbered_sequences(1, 3)
    shard = shard_row(sequences, 60, RankSlice(1, 0, 1, 0))
    lengths = [sequence.num_tokens for sequence in sequences]
    lengths[-1] += 60 - sum(lengths)
    assert shard.padded_lengths == lengths
    assert shard.position_ids_S.tolist() == [place for length in lengths for place in range(length)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sequences_of_padding_move_no_token(sizes: tuple[int, int]) -> None:
    """Every rank has the same tokens of the sequences, and those of the padding train on nothing."""
    context_size, tensor_size = sizes
    sequences = numbered_sequences(4, 5)
    own = [padded_length(sequence, context_size) for sequence in sequences]
    extra = padding_sequences(len(sequences), context_size)
    assert len(extra) == 3
    row_tokens = row_length([*own, *extra], context_size, tensor_size)
    for context_rank in range(context_size):
        for tensor_rank in range(tensor_size):
            place = RankSlice(context_size, context_rank, tensor_size, tensor_rank)
            shard = shard_row(sequences, row_tokens, place, extra)
            assert len(shard.padded_lengths) == 8
            assert shard.padded_lengths[: len(own)] == own
            padding = shard.sequence_L >= len(sequences)
            assert not shard.mask_L[padding].any()
            assert (shard.flat_slot_L[padding] == -1).all()
    held = sum(sequence.num_tokens for sequence in sequences)
    whole = [shard_row(sequences, held + 9, RankSlice(1, 0, 1, 0), padding) for padding in ([], [1, 1, 1])]
    for name in ("input_ids_S", "position_ids_S", "label_ids_S", "mask_L", "advantages_L", "flat_slot_L", "sequence_L"):
        without, with_them = (getattr(shard, name)[:held] for shard in whole)
        assert np.array_equal(without, with_them), name
    assert whole[0].num_tokens == whole[1].num_tokens
    assert whole[0].num_sequences == whole[1].num_sequences


def test_padding_has_many_token_ids() -> None:
    """With one id all padding would go to the same experts of a layer."""
    sequences = numbered_sequences(1, 3)
    num_tokens = sum(sequence.num_tokens for sequence in sequences)
    padding = shard_row(sequences, 2 * num_tokens, RankSlice(1, 0, 1, 0)).input_ids_S[num_tokens:]
    assert sorted(padding) == sorted(token for one in sequences for token in (*one.prompt_ids, *one.response_ids))


def test_a_sequence_without_prompt_is_a_bug() -> None:
    sequence = numbered_sequences(1, 1)[0]
    empty = TokenSequence(
        sequence.prompt_ids[:0],
        sequence.response_ids,
        sequence.loss_mask,
        sequence.behavior_log_probs,
        sequence.rollout_log_probs,
        0.0,
        0,
    )
    with pytest.raises(AssertionError, match="without a prompt"):
        shard_row([sequence, empty], 40, RankSlice(1, 0, 1, 0))
