"""What the last pipeline stage computes from a micro-batch's log-probs: the loss, a survey's tokens, or scores."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minpro_megatron.actor.forward import MicroBatch, TokenScores
from minpro_megatron.actor.kept_ids import support_statistics
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.config.objective import ObjectiveSection
from minpro_megatron.objective.across_ranks.sharded_scan import ShardedScan
from minpro_megatron.objective.correction_statistics import correction_statistics
from minpro_megatron.objective.corrections import Effects, OtherLogProbs, corrected
from minpro_megatron.objective.diagnostics import Statistics, token_statistics
from minpro_megatron.objective.mean_statistics import MeanStatistics
from minpro_megatron.objective.registry import Objective
from minpro_megatron.objective.terms import ObjectiveTerms, PolicyTokens, policy_tokens, summed_loss, summed_value
from minpro_megatron.parallel.mesh import Mesh


class TrainedTokens(NamedTuple):
    """The results of training on a micro-batch."""

    statistics: Statistics
    means: list[MeanStatistics]  # of the corrections that are enabled, and of support replay
    by_slot: dict[str, Any]


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a run. The methods are Megatron loss functions (actor.forward.LossFunction)."""

    mesh: Mesh
    objective: Objective
    objective_settings: ObjectiveSection
    settings: LossConfig

    def train(self, scores: TokenScores, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, TrainedTokens]:
        """The loss summed over the local slots, their number of trained tokens, and their results."""
        row = micro_batch.row
        tokens, terms, effects, others = self._terms(scores, micro_batch)
        by_sequence = self.objective_settings.aggregation == "sequence_mean"
        weight = micro_batch.tensor("sequence_weight_L") if by_sequence else tokens.mask_L
        # Megatron divides the gradients by the sum of these counts over micro-batches, data and context ranks, but
        # not over tensor ranks, each of which returns the count of the whole context shard
        count = row.num_sequences if by_sequence else row.num_tokens
        own_count = count if self.mesh.tensor.rank() == 0 else 0
        loss = summed_value(terms, weight), own_count
        staleness = micro_batch.tensor("staleness_L")
        statistics = token_statistics(tokens, terms, scores.entropies_L, others, staleness, loss)
        means = (
            correction_statistics(tokens, effects),
            support_statistics(tokens, scores, micro_batch.supports, self.mesh),
        )
        return (
            summed_loss(scores.log_probs_L, terms, weight),
            weight.new_full((), count, dtype=torch.int),
            TrainedTokens(
                statistics,
                [one for one in means if one is not None],
                by_slot(micro_batch, {"log_probs": scores.log_probs_L.detach()}),
            ),
        )

    def survey(self, scores: TokenScores, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, PolicyTokens]:
        """The tokens in the form that the objective takes, for its survey of the mini-batch."""
        nothing = scores.log_probs_L.new_zeros(())
        return nothing, nothing.int(), self._tokens(scores, micro_batch, self._others(scores, micro_batch))

    def inspect(self, scores: TokenScores, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Per-token results by name, each [L], and the `slots` that they belong to."""
        nothing = scores.log_probs_L.new_zeros(())
        tokens, terms, _, _ = self._terms(scores, micro_batch)
        found = {
            "log_probs": scores.log_probs_L.detach(),
            "coefficients": torch.where(tokens.is_trained_L, terms.coefficients_L, 0.0),
            "prefix_min": tokens.prefix_minimum_L,
        }
        return nothing, nothing.int(), by_slot(micro_batch, found)

    def _terms(
        self, scores: TokenScores, micro_batch: MicroBatch
    ) -> tuple[PolicyTokens, ObjectiveTerms, Effects, OtherLogProbs]:
        others = self._others(scores, micro_batch)
        tokens = self._tokens(scores, micro_batch, others)
        terms = self.objective.terms(tokens, self.objective_settings)
        return tokens, *corrected(terms, tokens, others, self.settings), others

    def _tokens(self, scores: TokenScores, micro_batch: MicroBatch, others: OtherLogProbs) -> PolicyTokens:
        mask = micro_batch.tensor("mask_L")
        scan = ShardedScan(
            micro_batch.tensor("sequence_L"),
            micro_batch.tensor("half_L"),
            mask,
            num_sequences=len(micro_batch.row.padded_lengths),
            group=self.mesh.tensor_and_context,
            tensor_size=self.mesh.tensor.size(),
            longest=max(micro_batch.row.padded_lengths),
        )
        return policy_tokens(
            scores.log_probs_L,
            others.denominator(self.settings),
            micro_batch.tensor("advantages_L"),
            mask,
            scan,
            micro_batch.tensor("flat_slot_L"),
            micro_batch.surveyed_L,
        )

    def _others(self, scores: TokenScores, micro_batch: MicroBatch) -> OtherLogProbs:
        if not self.objective_settings.compares_policies:  # every ratio is 1
            own = scores.log_probs_L.detach()
            return OtherLogProbs(behavior_L=own, rollout_L=own, proximal_L=own, reference_L=own)
        return OtherLogProbs(
            behavior_L=micro_batch.tensor("behavior_log_probs_L"),
            rollout_L=micro_batch.tensor("rollout_log_probs_L"),
            proximal_L=micro_batch.tensor("proximal_log_probs_L"),
            reference_L=micro_batch.tensor("reference_log_probs_L"),
        )


def score(scores: TokenScores, micro_batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The log-probs alone, in the form of PolicyLoss.inspect."""
    nothing = scores.log_probs_L.new_zeros(())
    return nothing, nothing.int(), by_slot(micro_batch, {"log_probs": scores.log_probs_L.detach()})


def by_slot(micro_batch: MicroBatch, values: dict[str, Tensor]) -> dict[str, Any]:
    """Per-token `values` by name, each [L], and the `slots` of the mini-batch that they belong to."""
    return {"slots": micro_batch.row.flat_slot_L, "values": values}


def with_survey(micro_batches: list[MicroBatch], surveyed: list[Tensor]) -> list[MicroBatch]:
    return [replace(one, surveyed_L=found) for one, found in zip(micro_batches, surveyed, strict=True)]
