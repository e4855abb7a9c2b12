"""Responses with given tokens between sampled ones."""

from collections.abc import Sequence

import msgspec
import numpy as np

from minpro_megatron.records import NO_LOG_PROB, NOT_SAMPLED, CollectedGroup, Response, Turn


def as_episode(response: Response, mask: Sequence[int], seconds: float = 0.5) -> Response:
    """The response with a token for each entry of `mask`; where that is 0, the token is given."""
    loss_mask, length = np.asarray(mask, np.uint8), len(mask)
    given = loss_mask == 0
    ids = np.resize(response.token_ids, length).astype(np.int32)
    versions = np.where(given, NOT_SAMPLED, np.resize(response.policy_versions, length)).astype(np.int32)
    log_probs = np.where(given, NO_LOG_PROB, np.resize(response.rollout_log_probs, length)).astype(np.float32)
    return msgspec.structs.replace(
        response,
        token_ids=ids,
        policy_versions=versions,
        rollout_log_probs=log_probs,
        loss_mask=loss_mask,
        turns=turns_of_mask(loss_mask, seconds),
    )


def turns_of_mask(loss_mask: np.ndarray, seconds: float) -> list[Turn]:
    parts = np.split(loss_mask, np.flatnonzero(np.diff(loss_mask)) + 1)
    lengths = [len(part) for part in parts] + [0]
    pairs = zip(lengths[::2], lengths[1::2], strict=True)
    return [
        Turn(sampled_tokens=sampled, given_tokens=given, tool_calls=int(given > 0), seconds=seconds * (given > 0))
        for sampled, given in pairs
    ]


def with_given_tokens(group: CollectedGroup, mask: Sequence[int] = (1, 1, 0, 0, 1, 0, 1)) -> CollectedGroup:
    """The first response of the group has given tokens, the others have none."""
    first, *others = group.responses
    return msgspec.structs.replace(group, responses=[as_episode(first, mask), *others])
