"""Checks the servers' routes (R3) and puts them into the slots of one rank, for its routers.

A server returns the experts of every token except the last sampled one, which never went through its model.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from minpro_megatron.batching.row_shard import RowShard
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.errors import UserError


def refuse_other_routes(
    sequences: Sequence[TokenSequence], num_layers: int, num_experts: int, experts_per_token: int
) -> None:
    """Raises ValueError if routes are missing, or are not [tokens - 1, layers, experts per token] of this model.

    Checks only shapes; `wrong_choice` checks the experts.
    """
    missing = sum(sequence.routed_experts is None for sequence in sequences)
    if missing:
        raise UserError(
            f"model.routing_replay = rollout: {missing} of {len(sequences)} responses have no routes: they were "
            "sampled without this setting, or their routes have been removed (collector.journal_keep_routes=false)"
        )
    for sequence in sequences:
        assert sequence.routed_experts is not None
        found, needed = sequence.routed_experts.shape, (sequence.num_tokens - 1, num_layers, experts_per_token)
        if found != needed:
            raise UserError(
                f"model.routing_replay = rollout: the routes of a response have the shape {found}, but [prompt + "
                f"response tokens - 1, layers, experts per token] is {needed} for the model of {num_experts} experts; "
                "serve the model of model.hf_path, with all of the prompt's routes"
            )


def shard_routes(shard: RowShard, layers: slice, num_experts: int, experts_per_token: int) -> np.ndarray:
    """The experts of this rank's slots, uint8 or int16 [layers, L, experts per token], for the model's `layers`. Stored
    routes must have been read.

    Padding and each sequence's last token have no routes, and no loss depends on their experts: no token attends to
    padding, and no token follows the last one. They are assigned to the experts in turn, so that every expert gets the
    same number of them: a fixed choice would send all padding to one expert rank.
    """
    given = [routes for routes in shard.routed_experts if isinstance(routes, np.ndarray)]
    assert len(given) == len(shard.routed_experts), "sequences without routes, or with routes that have not been read"
    dtype = np.result_type(np.uint8 if num_experts <= 256 else np.int16, *(routes.dtype for routes in given))
    chosen = np.empty((layers.stop - layers.start, len(shard.position_L), experts_per_token), dtype)
    unrouted = np.ones(len(shard.position_L), bool)
    for place, routes in enumerate(given):
        # a rank's slots are ordered by sequence
        first, end = np.searchsorted(shard.sequence_L, [place, place + 1])
        positions = shard.position_L[first:end]
        slots = first + np.flatnonzero(positions < len(routes))
        chosen[:, slots] = routes[shard.position_L[slots], layers].transpose(1, 0, 2)
        unrouted[slots] = False
    free = np.flatnonzero(unrouted)
    turns = free[:1] + np.arange(len(free))  # rows with one such slot must not all start with the same expert
    chosen[:, free] = (turns[:, None] * experts_per_token + np.arange(experts_per_token)) % num_experts
    return chosen


def wrong_choice(chosen: np.ndarray, first_layer: int, num_experts: int) -> str | None:
    """The error in the experts `chosen` [layers, tokens, experts per token], or None."""
    for layer, of_layer in enumerate(chosen, start=first_layer):
        outside = (of_layer < 0) | (of_layer >= num_experts)
        if outside.any():
            return (
                f"model.routing_replay = rollout: layer {layer}: a server sent a token to expert "
                f"{of_layer[outside][0]}, but the model's experts are 0 to {num_experts - 1}; serve the model of "
                "model.hf_path"
            )
        for one, other in combinations(range(of_layer.shape[1]), 2):
            twice = of_layer[:, one] == of_layer[:, other]
            if twice.any():
                return (
                    f"model.routing_replay = rollout: layer {layer}: a server sent a token to the experts "
                    f"{of_layer[twice][0].tolist()}, one of them twice: it did not record this token's routes; "
                    "start the servers with --enable-return-routed-experts"
                )
    return None
