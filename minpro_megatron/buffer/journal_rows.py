"""The rows that the journal records for responses, with checksums."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from minpro_megatron.buffer.journal_checksums import ResponseRow, part_checksum, response_checksum
from minpro_megatron.records import CollectedGroup


def response_row(group: CollectedGroup, place: int, routes: str | None) -> ResponseRow:
    """The row of response `place`; `routes` is the location of its routes."""
    key, response = (group.issued.group_id, place), group.responses[place]
    scalars = {
        "sampling_seed": int(group.issued.sampling_seeds[place]),
        "num_tokens": len(response.token_ids),
        "finish_reason": response.finish_reason,
        "reward": float(response.reward) if response.is_graded else None,
    }
    versions = version_spans(response.policy_versions)
    arrays = response.token_ids.tobytes(), response.rollout_log_probs.tobytes(), versions.tobytes()
    return ResponseRow(
        *key,
        **scalars,
        token_ids=arrays[0],
        rollout_log_probs=arrays[1],
        policy_versions=arrays[2],
        behavior_log_probs=None,
        trained_log_probs=None,
        routes=routes,
        checksum=response_checksum(*key, **scalars),
        arrays_checksum=part_checksum(*key, "arrays", *arrays),
        behavior_checksum=None,
        trained_checksum=None,
        routes_checksum=part_checksum(*key, "routes", routes),
    )


def log_prob_rows(
    part: str, groups: Iterable[tuple[CollectedGroup, Sequence[np.ndarray]]]
) -> Iterator[tuple[bytes, int | None, int, int]]:
    """(bytes, checksum, group, place) of each response's log-probs."""
    for group, of_group in groups:
        for place, log_probs in enumerate(of_group):
            key, data = (group.issued.group_id, place), log_probs.tobytes()
            yield data, part_checksum(*key, part, data), *key


def version_spans(policy_versions: np.ndarray) -> np.ndarray:
    """Run lengths: (version, tokens) pairs, int32. Nearly all responses have a single version."""
    starts = np.flatnonzero(np.diff(policy_versions, prepend=policy_versions[0] - 1))
    lengths = np.diff(starts, append=len(policy_versions))
    return np.stack([policy_versions[starts], lengths], axis=1).astype(np.int32)
