"""Every slot gets the experts of its own token and layer; what has none takes the experts in turn."""

import re
from dataclasses import replace

import numpy as np
import pytest

from minpro_megatron.batching.collate import shard_row
from minpro_megatron.batching.routes import refuse_other_routes, shard_routes, wrong_choice
from minpro_megatron.batching.row_shard import RankSlice, RowShard
from minpro_megatron.batching.shards import tensor_shard
from minpro_megatron.batching.token_sequence import TokenSequence
from tests.support.numbered_sequences import SIZES, all_shards, numbered_sequences

LAYERS, EXPERTS, CHOSEN = 5, 16, 3


def experts_of(token_id: int, layer: int) -> np.ndarray:
    """Distinct experts that tell token and layer."""
    return (token_id * 5 + layer * 3 + np.arange(CHOSEN)) % EXPERTS


def routed_sequences(seed: int, count: int) -> list[TokenSequence]:
    routed = []
    for sequence in numbered_sequences(seed, count):
        ids = np.concatenate([sequence.prompt_ids, sequence.response_ids])[:-1]
        routes = [[experts_of(int(token_id), layer) for layer in range(LAYERS)] for token_id in ids]
        routed.append(replace(sequence, routed_experts=np.array(routes, np.uint8)))
    return routed


def ids_of_slots(shard: RowShard, tensor_size: int, tensor_rank: int) -> np.ndarray:
    return shard.input_ids_S[tensor_shard(len(shard.input_ids_S), tensor_size, tensor_rank)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("layers", [slice(0, 5), slice(0, 2), slice(2, 5), slice(4, 5)], ids=str)
def test_every_slot_has_the_experts_of_its_token_and_layer(sizes: tuple[int, int], layers: slice) -> None:
    sequences = routed_sequences(seed=1, count=5)
    last = {int(sequence.response_ids[-1]) for sequence in sequences}
    num_tokens = np.array([sequence.num_tokens for sequence in sequences])
    seen = set()
    for (_, tensor_rank), shard in all_shards(sequences, *sizes, extra=1).items():
        chosen = shard_routes(shard, layers, EXPERTS, CHOSEN)
        assert (chosen.dtype, chosen.shape) == (np.uint8, (layers.stop - layers.start, len(shard.mask_L), CHOSEN))
        assert wrong_choice(chosen, layers.start, EXPERTS) is None
        for slot, token_id in enumerate(ids_of_slots(shard, sizes[1], tensor_rank).tolist()):
            if token_id not in last and shard.position_L[slot] < num_tokens[shard.sequence_L[slot]]:
                seen.add(token_id)
                for place, layer in enumerate(range(layers.start, layers.stop)):
                    np.testing.assert_array_equal(chosen[place, slot], experts_of(token_id, layer))
    assert seen | last == set(range(1, 1 + sum(sequence.num_tokens for sequence in sequences)))


@pytest.mark.parametrize("sequences", [[], routed_sequences(seed=2, count=3)], ids=["no sequence", "sequences"])
def test_padding_goes_to_all_experts_alike(sequences: list[TokenSequence]) -> None:
    for tensor_rank in range(2):
        shard = shard_row(sequences, 512, RankSlice(2, 1, 2, tensor_rank))
        chosen = shard_routes(shard, slice(1, 3), EXPERTS, CHOSEN)
        assert wrong_choice(chosen, 1, EXPERTS) is None
        last = np.array([len(one.prompt_ids) + len(one.response_ids) - 1 for one in sequences] or [0])
        unrouted = shard.position_L >= last[shard.sequence_L]
        assert unrouted.sum() > 100
        for of_layer in chosen:
            counts = np.bincount(of_layer[unrouted].ravel(), minlength=EXPERTS)
            assert counts.max() - counts.min() <= 1


def test_single_slots_without_a_route_begin_at_different_experts() -> None:
    firsts = set()
    for sequence in routed_sequences(seed=3, count=12):
        shard = shard_row([sequence], sequence.num_tokens, RankSlice(1, 0, 1, 0))
        firsts.add(int(shard_routes(shard, slice(0, 1), EXPERTS, CHOSEN)[0, -1, 0]))
    assert len(firsts) > 3


@pytest.mark.parametrize(("num_experts", "dtype"), [(256, np.uint8), (257, np.int16)])
def test_a_row_of_padding_takes_the_smallest_type_for_the_experts(num_experts: int, dtype: type) -> None:
    shard = shard_row([], 512, RankSlice(1, 0, 1, 0))
    chosen = shard_routes(shard, slice(0, 1), num_experts, 1)
    assert chosen.dtype == dtype
    assert set(chosen.ravel().tolist()) == set(range(num_experts))


def refusal(sequences: list[TokenSequence], num_layers: int = LAYERS, experts_per_token: int = CHOSEN) -> str:
    with pytest.raises(ValueError, match=r"^model\.routing_replay = rollout: ") as refused:
        refuse_other_routes(sequences, num_layers, EXPERTS, experts_per_token)
    return str(refused.value)


def test_missing_and_misshapen_routes_are_refused_with_what_to_do() -> None:
    sequences = routed_sequences(seed=4, count=4)
    refuse_other_routes(sequences, LAYERS, EXPERTS, CHOSEN)
    tokens, routes = sequences[1].num_tokens, sequences[1].routed_experts
    assert isinstance(routes, np.ndarray)
    absent = [sequences[0], replace(sequences[1], routed_experts=None), replace(sequences[2], routed_experts=None)]
    assert "2 of 3 responses have no routes: they were sampled without this setting, or" in refusal(absent)
    short = refusal([sequences[0], replace(sequences[1], routed_experts=routes[:-1])])
    assert f"the shape ({tokens - 2}, 5, 3), but " in short
    assert f"is ({tokens - 1}, 5, 3) for the model of 16 experts; serve the model of model.hf_path" in short
    assert "is (" in refusal(sequences, num_layers=6)
    assert "is (" in refusal(sequences, experts_per_token=4)
    assert "is (" in refusal([replace(sequences[1], routed_experts=np.concatenate([routes, routes[:1]]))])


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ([1, 16, 2], "layer 11: a server sent a token to expert 16, but the model's experts are 0 to 15"),
        ([-1, 3, 2], "layer 11: a server sent a token to expert -1, but"),
        ([4, 2, 4], r"layer 11: a server sent a token to the experts \[4, 2, 4\], one of them twice"),
        ([0, 0, 0], r"\[0, 0, 0\], one of them twice: it did not record this token's routes; start the servers with"),
    ],
    ids=str,
)
def test_experts_that_the_model_cannot_take_are_reported_with_their_layer(experts: list[int], message: str) -> None:
    chosen = np.tile(np.array([3, 0, 15], np.int16), (4, 7, 1))
    assert wrong_choice(chosen, 10, EXPERTS) is None
    chosen[1, 6] = experts
    assert re.search(message, wrong_choice(chosen, 10, EXPERTS) or "")
