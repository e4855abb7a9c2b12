"""The arrays of a server's answer: each is checked as a whole, because a group may have 300,000 tokens."""

import math
from collections.abc import Sequence
from itertools import chain

import numpy as np

from minpro_megatron.batching.supports import largest_support, support_array
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.serving.errors import InvalidAnswer

# Rounding may raise the log-prob of a certain token above 0 by a few units in the last place.
MAX_LOG_PROB = 1e-5


class Requirement:
    """Raises InvalidAnswer for the first requirement that does not hold."""

    def __init__(self, server: str, request_id: str) -> None:
        self._server, self._request_id = server, request_id

    def __call__(self, holds: bool, field: str, problem: str) -> None:
        if not holds:
            raise InvalidAnswer(self._server, self._request_id, field, problem)


def checked_log_probs(values: Sequence[float], num_tokens: int, field: str, require: Requirement) -> np.ndarray:
    """float32 [num_tokens]; each must be finite, and that of a probability."""
    require(len(values) == num_tokens, field, f"{len(values)} entries for {num_tokens} output_ids")
    with np.errstate(over="ignore"):  # to -inf, which is rejected
        log_probs = np.array(values).astype(np.float32)
    wrong = log_probs[~(np.isfinite(log_probs) & (log_probs <= MAX_LOG_PROB))]
    require(not wrong.size, field, f"{wrong[:3].tolist()} are not log-probs")
    return log_probs


def checked_routes(data: bytes | None, num_rows: int, facts: ModelFacts, require: Requirement) -> np.ndarray:
    """uint8 or int16 [num_rows, layers, experts per token] of the bytes of int32, which msgspec has decoded."""
    field = "meta_info.routed_experts"
    if data is None:
        require(False, field, "missing; start the server with --enable-return-routed-experts")
    assert data is not None
    shape = (num_rows, facts.num_layers, facts.experts_per_token)
    expected = 4 * math.prod(shape)
    require(len(data) == expected, field, f"{len(data)} bytes instead of {expected} for int32 of shape {shape}")
    routes = np.frombuffer(data, dtype="<i4").reshape(shape)
    require(
        routes.size == 0 or (routes.min() >= 0 and routes.max() < facts.num_experts),
        field,
        f"an expert outside the model's {facts.num_experts}",
    )
    return routes.astype(np.uint8 if facts.num_experts <= 256 else np.int16)


def checked_supports(
    kept: Sequence[list[int]], tokens: np.ndarray, top_k: int, vocabulary_size: int, require: Requirement
) -> np.ndarray:
    """The kept ids of the sampled tokens, in the form of batching/supports.py."""
    field = "meta_info.output_token_sampling_mask"
    require(len(kept) > 0, field, "missing; connect to the server directly: a router in between may drop it")
    require(len(kept) == len(tokens), field, f"kept ids of {len(kept)} tokens for {len(tokens)} output_ids")
    sizes, limit = np.array([len(ids) for ids in kept]), largest_support(top_k)
    require(bool(sizes.max() <= limit), field, f"{sizes.max()} kept ids of a token exceed {limit}")
    has_own = all(token in ids for token, ids in zip(tokens.tolist(), kept, strict=True))
    require(has_own, field, "a sampled token is not among its kept ids")
    require(all(len(set(ids)) == len(ids) for ids in kept), field, "a kept id is there twice")
    ids = np.array(list(chain.from_iterable(kept)))
    is_inside = bool(ids.min() >= 0 and ids.max() < vocabulary_size)
    require(is_inside, field, f"a kept id outside the vocabulary of {vocabulary_size}")
    return support_array(sizes, ids)
