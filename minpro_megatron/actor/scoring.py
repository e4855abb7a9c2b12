"""Computes the log-probs that a batch needs before training: behavior, proximal and reference log-probs."""

from dataclasses import dataclass

import numpy as np

from minpro_megatron.actor.behavior import flat, mini_batches_of, score_and_record, score_by_version
from minpro_megatron.actor.kept_versions import KeptVersions
from minpro_megatron.actor.policy import Policy
from minpro_megatron.actor.routing import Routes
from minpro_megatron.batching.sequences import token_sequences, with_known_scores, with_log_probs
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.records import Batch

REFERENCE = "reference"  # name of the snapshot of the initial weights


@dataclass(frozen=True)
class ScoredBatch:
    """A batch with its sequences, [group][response], and their behavior log-probs, float32 [all response tokens]."""

    batch: Batch
    groups: list[list[TokenSequence]]
    log_probs: np.ndarray
    routes: list[Routes] | None  # of each mini-batch, if routes are replayed


class BatchScoring:
    """Scores batches, packed as their updates will pack them. Every method is collective."""

    def __init__(self, config: RunConfig, policy: Policy, versions: KeptVersions) -> None:
        self._config = config
        self._policy = policy
        self._versions = versions

    def keep_reference(self) -> None:
        """Save a snapshot of the current weights as the reference of the KL term, if that is enabled."""
        if self._config.loss.kl.enabled:
            self._policy.take_snapshot(REFERENCE)

    def behavior(self, batch: Batch) -> ScoredBatch:
        """The batch with its behavior log-probs. A group that was scored before the run was interrupted keeps its
        log-probs."""
        groups = token_sequences(batch, self._config.loss, self._config.sampling.max_response_tokens)
        if self._config.staleness.behavior_log_probs == "rollout":
            log_probs = np.concatenate([sequence.rollout_log_probs for sequence in flat(groups)])
            return ScoredBatch(batch, groups, log_probs, None)
        mini_batches = self.mini_batches(groups)
        if self._config.model.routing_replay == "scored":
            return ScoredBatch(batch, groups, *score_and_record(self._policy, mini_batches))
        versions = [
            [None if group.is_scored else response.policy_versions for response in group.responses]
            for group in batch.groups
        ]
        fresh = score_by_version(self._policy, mini_batches, self.mini_batches(versions), self._versions.weights_of)
        return ScoredBatch(batch, groups, with_known_scores(batch, fresh), None)

    def complete(self, scored: ScoredBatch) -> list[list[TokenSequence]]:
        """The mini-batches of the batch, with all log-probs that the loss needs: besides the behavior log-probs, those
        of the current weights (loss.decoupled) and of the reference (loss.kl). Each costs a scoring pass."""
        found, mini_batches = {"behavior_log_probs": scored.log_probs}, self.mini_batches(scored.groups)
        if self._config.loss.decoupled.enabled:
            routes = scored.routes or [None] * len(mini_batches)
            parts = [self._policy.score(*pair) for pair in zip(mini_batches, routes, strict=True)]
            found["proximal_log_probs"] = np.concatenate(parts)
        if self._config.loss.kl.enabled:
            with self._policy.use_snapshot(REFERENCE):
                parts = [self._policy.score(mini_batch) for mini_batch in mini_batches]
            found["reference_log_probs"] = np.concatenate(parts)
        return self.mini_batches(with_log_probs(scored.groups, **found))

    def mini_batches[Item](self, groups: list[list[Item]]) -> list[list[Item]]:
        """The items of each mini-batch's groups."""
        return mini_batches_of(groups, self._config.batch.mini_batch_prompts)
