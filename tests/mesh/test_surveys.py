"""Objectives and their surveys of the mini-batch are the same on ranks that hold pieces of its sequences."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.batching.collate import shard_row
from minpro_megatron.batching.row_lengths import padded_length, row_length
from minpro_megatron.batching.row_shard import RankSlice
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.objective import M2poConfig, M2poWinsorizedConfig, PrefixFilterConfig
from minpro_megatron.objective.across_ranks.group_ranks import GroupRanks
from minpro_megatron.objective.across_ranks.sharded_scan import ShardedScan
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import MiniBatch, policy_tokens
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.support.long_cases import long_after
from tests.support.ragged_tokens import DEFAULTS, Tokens, random_tokens, surveyed

pytestmark = pytest.mark.mesh

SEED = 5
ROWS = 4
SETTINGS: dict[str, Any] = DEFAULTS | {
    "m2po": M2poConfig(second_moment=0.2),
    "m2po_winsorized": M2poWinsorizedConfig(second_moment=0.2),
    "prefix_filter": PrefixFilterConfig(quantile=0.2),
}


def as_sequences(tokens: Tokens) -> list[TokenSequence]:
    sequences = []
    for name in np.unique(tokens.sequence):
        place = np.flatnonzero(tokens.sequence == name)
        sequences.append(
            TokenSequence(
                prompt_ids=np.ones(1 + name % 4, np.int32),
                response_ids=np.ones(len(place), np.int32),
                loss_mask=tokens.mask[place],
                behavior_log_probs=tokens.behavior[place],
                rollout_log_probs=tokens.behavior[place],
                advantage=float(tokens.advantages[place[0]]),
                first_slot=int(place[0]),
            )
        )
    return sequences


def _on_rank(mesh: Mesh, tokens: Tokens) -> dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """For every objective and micro-batch: the places of the rank's tokens, what was surveyed, the coefficients."""
    sequences = as_sequences(tokens)
    place = RankSlice(mesh.context.size(), mesh.context.rank(), mesh.tensor.size(), mesh.tensor.rank())
    lengths = [padded_length(sequence, place.context_size) for sequence in sequences]
    rows = [list(range(row, len(sequences), ROWS)) for row in range(ROWS)]
    log_probs = torch.from_numpy(np.append(tokens.log_probs, np.float32(np.nan)))  # NaN for slots without a token
    seen = []
    for row in rows[mesh.data.rank() :: mesh.data.size()]:
        length = row_length([lengths[index] for index in row], place.context_size, place.tensor_size)
        shard = shard_row([sequences[index] for index in row], length, place)
        mask = torch.from_numpy(shard.mask_L)
        scan = ShardedScan(
            torch.from_numpy(shard.sequence_L),
            torch.from_numpy(shard.half_L),
            mask,
            num_sequences=len(shard.padded_lengths),
            group=mesh.tensor_and_context,
            tensor_size=mesh.tensor.size(),
        )
        behavior, advantages = torch.from_numpy(shard.behavior_log_probs_L), torch.from_numpy(shard.advantages_L)
        ids = torch.from_numpy(shard.flat_slot_L)
        seen.append(policy_tokens(log_probs[ids], behavior, advantages, mask, scan, ids))
    mini_batch, found = MiniBatch(seen, GroupRanks(mesh.stage), SEED), {}
    for name, objective in OBJECTIVES.items():
        result = objective.survey(mini_batch, SETTINGS[name]) if objective.survey else [one.mask_L for one in seen]
        terms = [
            objective.terms(replace(one, surveyed_L=of), SETTINGS[name]) for one, of in zip(seen, result, strict=True)
        ]
        held = [one.ids_L >= 0 for one in seen]
        found[name] = [
            (one.ids_L[has].numpy(), of[has].numpy(), term.coefficients_L[has].numpy())
            for one, of, term, has in zip(seen, result, terms, held, strict=True)
        ]
    return found


@pytest.mark.parametrize("degrees", long_after(1, [{"context": 2, "tensor": 2}, {"context": 2, "data": 2}]), ids=str)
def test_surveys_and_coefficients_are_those_of_whole_sequences(degrees: dict[str, int]) -> None:
    tokens = random_tokens(41, num_sequences=14)
    ranks = run_mesh(_on_rank, tokens, **degrees)
    for name, objective in OBJECTIVES.items():
        settings = SETTINGS[name]
        (seen,) = surveyed(name, [tokens.for_objective(torch.float32)], settings, SEED)
        expected = objective.terms(seen, settings).coefficients_L.numpy()
        parts = [part for rank in ranks for part in rank[name]]
        assert sorted(np.concatenate([ids for ids, _, _ in parts])) == list(range(len(tokens.mask)))
        for ids, found, coefficients in parts:
            trained = tokens.trained[ids]
            np.testing.assert_allclose(coefficients[trained], expected[ids][trained], rtol=1e-11, atol=1e-11)
            if seen.surveyed_L is not None:
                surveyed_here = seen.surveyed_L.numpy()[ids][trained]
                rounding = 1e-14 if name == "p3o" else 0.0  # its sums are added in another order
                np.testing.assert_allclose(found[trained], surveyed_here, rtol=rounding, err_msg=name)
