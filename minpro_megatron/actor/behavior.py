"""Behavior log-probs: the denominator of the ratio, computed once, under the same weights that sampled the token."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from minpro_megatron.actor.policy import Policy
from minpro_megatron.actor.routing import Routes
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.records import NO_LOG_PROB, NOT_SAMPLED

# Returns a context manager inside which the model has the weights of a policy version.
WeightsOf = Callable[[int], AbstractContextManager[None]]


def flat[Item](groups: Sequence[Sequence[Item]]) -> list[Item]:
    return [item for group in groups for item in group]


def mini_batches_of[Item](groups: Sequence[Sequence[Item]], num_groups: int) -> list[list[Item]]:
    """The mini-batches: the sequences of each `num_groups` consecutive groups."""
    return [flat(groups[first : first + num_groups]) for first in range(0, len(groups), num_groups)]


def score_by_version(
    policy: Policy,
    mini_batches: Sequence[Sequence[TokenSequence]],
    versions: Sequence[Sequence[np.ndarray | None]],
    weights_of: WeightsOf,
) -> np.ndarray:
    """Log-probs of response tokens, float32 [tokens], each under the version that sampled it. Collective.

    `versions` has an int32 array [response tokens] for each sequence of each mini-batch, or None for a sequence that is
    not to be scored: the result excludes it. Given tokens (NOT_SAMPLED) get NO_LOG_PROB. Rows are packed as the updates
    will pack them: with other neighbors in a row the rounding differs, and a mixture of experts then sometimes chooses
    other experts. A batch of one version costs one pass; with several versions, each costs a pass over the rows that
    have a sequence with tokens of it.
    """
    found = [[None if one is None else np.full(len(one), NO_LOG_PROB, np.float32) for one in own] for own in versions]
    present = {int(one) for own in flat(versions) if own is not None for one in np.unique(own)}
    for version in sorted(present - {NOT_SAMPLED}):
        with weights_of(version):
            for mini_batch, own, into in zip(mini_batches, versions, found, strict=True):
                _score_version(policy, mini_batch, own, version, into)
    parts = [part for of_mini_batch in found for part in of_mini_batch if part is not None]
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _score_version(
    policy: Policy,
    mini_batch: Sequence[TokenSequence],
    versions: Sequence[np.ndarray | None],
    version: int,
    into: Sequence[np.ndarray | None],
) -> None:
    """Fills `into`, one array per sequence, at the tokens of `version`, whose weights are in the model."""
    wanted = [own is not None and bool((own == version).any()) for own in versions]
    if not any(wanted):
        return
    ends = np.cumsum([len(sequence.response_ids) for sequence in mini_batch])
    log_probs = np.split(policy.score(mini_batch, wanted=wanted), ends[:-1])
    for scored, own, target in zip(log_probs, versions, into, strict=True):
        if own is not None and target is not None:
            of_version = own == version
            target[of_version] = scored[of_version]


def score_and_record(
    policy: Policy, mini_batches: Sequence[Sequence[TokenSequence]]
) -> tuple[np.ndarray, list[Routes]]:
    """Log-probs under the current weights, and each mini-batch's routes. Rows are packed as the updates will pack them,
    so that every route stays on the rank that needs it again. Collective."""
    scored = [policy.score_and_record(mini_batch) for mini_batch in mini_batches]
    return np.concatenate([log_probs for log_probs, _ in scored]), [routes for _, routes in scored]
