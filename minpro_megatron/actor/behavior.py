"""Behavior log-probs: the denominator of the ratio, computed once, under the very weights that sampled the token."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from minpro_megatron.actor.policy import Policy
from minpro_megatron.actor.routing import Routes
from minpro_megatron.batching.collate import TokenSequence

# A context manager within which the weights of a policy version are in place.
WeightsOf = Callable[[int], AbstractContextManager[None]]


def flat(groups: Sequence[Sequence[TokenSequence]]) -> list[TokenSequence]:
    return [sequence for group in groups for sequence in group]


def mini_batches_of(groups: Sequence[Sequence[TokenSequence]], num_groups: int) -> list[list[TokenSequence]]:
    """The sequences of each `num_groups` groups in turn."""
    return [flat(groups[first : first + num_groups]) for first in range(0, len(groups), num_groups)]


def score_by_version(
    policy: Policy, sequences: Sequence[TokenSequence], versions: Sequence[np.ndarray], weights_of: WeightsOf
) -> np.ndarray:
    """Log-probs of all response tokens, float32 [tokens], each under the version that sampled it. Collective.

    `versions` has an int32 array [response tokens] for each sequence. Costs a pass over the sequences of each version.
    """
    lengths = [len(of_sequence) for of_sequence in versions]
    ends = np.cumsum(lengths)
    found = np.empty(int(sum(lengths)), dtype=np.float32)
    for version in sorted({int(version) for of_sequence in versions for version in np.unique(of_sequence)}):
        places = [place for place, of_sequence in enumerate(versions) if (of_sequence == version).any()]
        with weights_of(version):
            log_probs = policy.score([sequences[place] for place in places])
        parts = np.split(log_probs, np.cumsum([lengths[place] for place in places])[:-1])
        for place, part in zip(places, parts, strict=True):
            own = found[ends[place] - lengths[place] : ends[place]]
            of_version = versions[place] == version
            own[of_version] = part[of_version]
    return found


def score_and_record(
    policy: Policy, mini_batches: Sequence[Sequence[TokenSequence]]
) -> tuple[np.ndarray, list[Routes]]:
    """Log-probs under the weights in place, and each mini-batch's routes: packed as the updates will pack them, so
    that every route stays on the rank that needs it again. Collective."""
    scored = [policy.score_and_record(mini_batch) for mini_batch in mini_batches]
    return np.concatenate([log_probs for log_probs, _ in scored]), [routes for _, routes in scored]
