"""The rows that the journal records for responses, with checksums."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np

from minpro_megatron.buffer.journal_checksums import (
    ResponseRow,
    arrays_checksum,
    part_checksum,
    response_checksum,
)
from minpro_megatron.buffer.route_files import Places
from minpro_megatron.records import CollectedGroup, Turn


def response_row(group: CollectedGroup, place: int, stored: Places) -> ResponseRow:
    """The row of response `place`, whose routes and supports are `stored` in a file."""
    key, response = (group.issued.group_id, place), group.responses[place]
    scalars = {
        "sampling_seed": int(group.issued.sampling_seeds[place]),
        "num_tokens": len(response.token_ids),
        "finish_reason": response.finish_reason,
        "reward": float(response.reward) if response.is_graded else None,
    }
    versions = version_spans(response.policy_versions)
    arrays = response.token_ids.tobytes(), response.rollout_log_probs.tobytes(), versions.tobytes()
    loss_mask = None if response.loss_mask is None else response.loss_mask.tobytes()
    turns = turns_text(response.turns)
    return ResponseRow(
        *key,
        **scalars,
        token_ids=arrays[0],
        rollout_log_probs=arrays[1],
        policy_versions=arrays[2],
        behavior_log_probs=None,
        trained_log_probs=None,
        routes=stored.routes,
        checksum=response_checksum(*key, **scalars, turns=turns),
        arrays_checksum=arrays_checksum(*key, arrays, loss_mask),
        behavior_checksum=None,
        trained_checksum=None,
        routes_checksum=part_checksum(*key, "routes", stored.routes),
        loss_mask=loss_mask,
        turns=turns,
        supports=stored.supports,
        supports_checksum=part_checksum(*key, "supports", stored.supports),
    )


def log_prob_rows(
    part: str, groups: Iterable[tuple[CollectedGroup, Sequence[np.ndarray]]]
) -> Iterator[tuple[bytes, int | None, int, int]]:
    """(bytes, checksum, group, place) of each response's log-probs."""
    for group, of_group in groups:
        for place, log_probs in enumerate(of_group):
            key, data = (group.issued.group_id, place), log_probs.tobytes()
            yield data, part_checksum(*key, part, data), *key


def turns_text(turns: Sequence[Turn]) -> str | None:
    """The turns as JSON; None for a response to one request."""
    return msgspec.json.encode(turns).decode() if turns else None


def turns_of(text: str | None) -> list[Turn]:
    """The inverse of `turns_text`."""
    return [] if text is None else msgspec.json.decode(text, type=list[Turn])


def loss_mask_of(data: bytes | None) -> np.ndarray | None:
    """The loss mask in a response's row, uint8 [tokens]; None: all tokens are sampled, or they are pruned."""
    return None if data is None else np.frombuffer(data, np.uint8)


def version_spans(policy_versions: np.ndarray) -> np.ndarray:
    """Run lengths: (version, tokens) pairs, int32. Given tokens have spans of NOT_SAMPLED."""
    starts = np.flatnonzero(np.diff(policy_versions, prepend=policy_versions[0] - 1))
    lengths = np.diff(starts, append=len(policy_versions))
    return np.stack([policy_versions[starts], lengths], axis=1).astype(np.int32)
