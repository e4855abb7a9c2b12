"""Support replay: gives micro-batches the ids that truncated sampling kept, and reports how much they are."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from minpro_megatron.actor.forward import MicroBatch, TokenScores
from minpro_megatron.batching.stored_arrays import with_supports_read
from minpro_megatron.batching.supports import RowSupports, refuse_missing_supports, shard_supports, support_problem
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.errors import UserError
from minpro_megatron.objective.mean_statistics import MeanStatistics, mean_statistics
from minpro_megatron.objective.terms import PolicyTokens
from minpro_megatron.parallel.mesh import Mesh


def with_supports(
    sequences: Sequence[TokenSequence], micro_batches: Sequence[MicroBatch], top_k: int, vocab_size: int, mesh: Mesh
) -> list[MicroBatch]:
    """This rank's micro-batches of the mini-batch `sequences` with their supports, on the last pipeline stage, which
    alone computes log-probs. Collective.

    Raises the same ValueError on every rank if supports are missing, damaged or not those of the responses.
    """
    refuse_missing_supports(sequences, top_k)
    found, problem = list(micro_batches), None
    for place, micro_batch in enumerate(micro_batches if mesh.is_last_pipeline_stage else ()):
        try:
            row = with_supports_read(micro_batch.row)
            supports = shard_supports(row)
        except UserError as error:
            problem = str(error)
            break
        problem = problem or support_problem(supports, row, vocab_size)
        found[place] = replace(micro_batch, supports=supports)
    for one in mesh.from_all_ranks(problem):
        if one:
            raise UserError(f"sampling.top_k = {top_k}: {one}")
    return found


def support_statistics(
    tokens: PolicyTokens, scores: TokenScores, supports: RowSupports | None, mesh: Mesh
) -> MeanStatistics | None:
    """The statistics of the trained slots (metrics.declared describes them); None without support replay."""
    if supports is None or scores.kept_masses_L is None:
        return None
    sizes_L = torch.from_numpy(supports.sizes_S).chunk(mesh.tensor.size())[mesh.tensor.rank()]
    trained_L = tokens.is_trained_L
    return mean_statistics(
        {
            "support/mass": (scores.kept_masses_L.double(), trained_L),
            "support/size": (sizes_L.to(trained_L.device).double(), trained_L),
        }
    )
