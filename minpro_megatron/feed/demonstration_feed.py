"""Supervised fine-tuning: demonstrations of a file in place of the collector's groups (data.demonstrations)."""

from collections.abc import Iterator, Sequence

import numpy as np

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.prompts.demonstrations import read_demonstrations
from minpro_megatron.prompts.prompt_order import EpochOrder
from minpro_megatron.records import (
    NOT_GRADED,
    Batch,
    BehaviorLogProbs,
    CollectedGroup,
    CollectorTotals,
    IssuedGroup,
    PublishLease,
    Response,
    TrainedStep,
)


def demonstration_problems(config: RunConfig) -> Iterator[str]:
    """One line if the run cannot train on its demonstrations."""
    try:
        read_demonstrations(config)
    except UserError as error:
        yield from error.problems
    except OSError:  # a missing file of the model, which other checks report
        return


class DemonstrationFeed:
    """A BatchSource without servers: a group is a demonstration, with one response that nobody grades.

    Which demonstrations batch k has depends only on the seed and k: epoch after epoch, each in its own order. So there
    is nothing to save, and a resumed run asks for later batches. Nothing is published or evaluated.
    """

    def __init__(self, config: RunConfig) -> None:
        """Raises UserError as `read_demonstrations` does."""
        self._demonstrations = read_demonstrations(config)
        self._order = EpochOrder(len(self._demonstrations), config.seed, "demonstrations")
        self._num_prompts = config.batch.num_prompts
        self._num_steps = config.num_global_steps

    def start(self, version: int) -> None:
        """Does nothing: a resumed run asks for later steps."""

    def batch(self, index: int) -> Batch:
        """The demonstrations of global step `index`."""
        first = index * self._num_prompts
        return Batch(index=index, groups=[self._group(first + place, index) for place in range(self._num_prompts)])

    def scored(self, scores: BehaviorLogProbs) -> None:
        raise AssertionError("demonstrations have no behavior log-probs")

    def consumed(self, trained: TrainedStep) -> None:
        """Does nothing: the file does not change."""

    def release_begin(self, version: int) -> PublishLease:
        """A lease without servers, because there are none that have memory."""
        return PublishLease(version=version + 1, servers=[], evaluations=[], releases=True)

    def released(self, version: int, servers: Sequence[int]) -> None:
        assert not servers, "there are no servers"

    def publish_begin(self, version: int) -> PublishLease:
        """A lease without servers, because there are none to publish to."""
        return PublishLease(version=version, servers=[], evaluations=[])

    def publish_end(self, version: int, held_by: Sequence[int], late: Sequence[int] = ()) -> None:
        assert not held_by, "there are no servers"

    def checkpoint_begin(self, version: int) -> None:
        """Does nothing: the checkpoint relies on a file whose content the run folder records."""

    def checkpoint_end(self, version: int) -> None:
        """Does nothing: nothing is pruned."""

    def finish(self) -> CollectorTotals:
        """The totals of the demonstrations that were trained on."""
        num_groups = self._num_steps * self._num_prompts
        return CollectorTotals(
            groups_issued=num_groups,
            groups_consumed=num_groups,
            groups_dropped=0,
            groups_not_graded=0,
            smallest_staleness=0,
            largest_staleness=0,
            versions_published=0,
            evaluations=[],
        )

    def close(self) -> None:
        """Does nothing: the file is read once."""

    def _group(self, group_id: int, index: int) -> CollectedGroup:
        found = self._demonstrations[self._order[group_id]]
        issued = IssuedGroup(
            group_id=group_id,
            batch_index=index,
            policy_version=index,
            prompt=found.prompt,
            prompt_token_ids=found.prompt_token_ids,
            sampling_seeds=[0],
        )
        size = len(found.response_token_ids)
        # no policy has sampled these tokens: log-probs of zero stand for the missing ones, and the loss reads none
        response = Response(
            token_ids=found.response_token_ids,
            rollout_log_probs=np.zeros(size, np.float32),
            policy_versions=np.full(size, index, np.int32),
            finish_reason="stop",
            reward=NOT_GRADED,
            behavior_log_probs=np.zeros(size, np.float32),
        )
        return CollectedGroup(issued=issued, responses=[response])
