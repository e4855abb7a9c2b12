"""Checks that log-probs sent by the trainer fit their batch."""

from collections.abc import Iterator

import msgspec
import numpy as np

from minpro_megatron.errors import ProjectError
from minpro_megatron.records import Batch, BehaviorLogProbs, CollectedGroup, Response, TrainedStep
from minpro_megatron.serving.answer_arrays import MAX_LOG_PROB


class WrongScores(ProjectError, ValueError):
    """The log-probs sent by the trainer do not fit the batch."""


def check_scores(batch: Batch, scores: BehaviorLogProbs) -> None:
    """Raises WrongScores unless the scores are one finite log-prob per sampled token of the batch. Given tokens may
    have any value."""
    where = f"scores of batch {batch.index}"
    sampled_with = [one.of_sampled(one.policy_versions) for group in batch.groups for one in group.responses]
    if scores.policy_version >= 0 and any((versions != scores.policy_version).any() for versions in sampled_with):
        found = sorted({int(version) for versions in sampled_with for version in np.unique(versions)})
        raise WrongScores(f"{where}: computed with version {scores.policy_version}, sampled with {found}")
    for name, response, values in _by_response(where, batch, scores.log_probs):
        log_probs = response.of_sampled(values)
        if not np.isfinite(log_probs).all() or (log_probs > MAX_LOG_PROB).any():
            raise WrongScores(f"{name}: a value is not finite, or above 0")


def check_trained(batch: Batch, trained: TrainedStep) -> None:
    """Raises WrongScores unless the step has one log-prob per response token of the batch, or none at all. NaN is
    allowed: either no update trained on that token, or the update diverged."""
    if trained.log_probs:
        for _ in _by_response(f"log-probs of step {trained.step}", batch, trained.log_probs):
            pass


def with_scores(group: CollectedGroup, log_probs: list[np.ndarray]) -> CollectedGroup:
    responses = [
        msgspec.structs.replace(response, behavior_log_probs=scores)
        for response, scores in zip(group.responses, log_probs, strict=True)
    ]
    return CollectedGroup(issued=group.issued, responses=responses)


def _by_response(
    where: str, batch: Batch, log_probs: list[list[np.ndarray]]
) -> Iterator[tuple[str, Response, np.ndarray]]:
    """(name for a message, response, values) per response. Raises WrongScores if number, shape or dtype is wrong."""
    if len(log_probs) != len(batch.groups):
        raise WrongScores(f"{where}: {len(log_probs)} groups instead of {len(batch.groups)}")
    for group, of_group in zip(batch.groups, log_probs, strict=True):
        name = f"{where}, group {group.issued.group_id}"
        if len(of_group) != len(group.responses):
            raise WrongScores(f"{name}: {len(of_group)} responses instead of {len(group.responses)}")
        for place, (response, values) in enumerate(zip(group.responses, of_group, strict=True)):
            if values.dtype != np.float32 or values.shape != response.token_ids.shape:
                raise WrongScores(
                    f"{name}, response {place}: {values.dtype} of shape {values.shape} instead of "
                    f"float32 of shape {response.token_ids.shape}"
                )
            yield f"{name}, response {place}", response, values
