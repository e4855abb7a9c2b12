"""Training on the rollouts and scores of another run: its journal replaces the collector (debug.journal)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_reader import JournalReader, StoredGroup, StoredResponse, StoredStep
from minpro_megatron.buffer.journal_settings import top_k_of_run
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.records import (
    Batch,
    BehaviorLogProbs,
    CollectedGroup,
    CollectorTotals,
    IssuedGroup,
    Prompt,
    PublishLease,
    Response,
    TrainedStep,
)


def journal_problems(config: RunConfig) -> list[str]:
    """One line for each reason why the run cannot train on the journal `config.debug.journal`."""
    field = f"debug.journal = {config.debug.journal}"
    try:
        with JournalReader(Path(config.debug.journal)) as reader:
            steps, top_k_of_journal = reader.steps(), top_k_of_run(reader.path)
    except JournalError as error:
        return [f"{field}: {error}"]
    if missing := [step for step in range(config.num_global_steps) if step not in steps]:
        held = f"it holds {_ranges(sorted(steps))}" if steps else "it holds none"
        return [
            f"{field}: global steps {_ranges(missing)} of num_global_steps = {config.num_global_steps} are not in it "
            f"({held}); lower num_global_steps, or give another journal"
        ]
    wanted = [steps[step] for step in range(config.num_global_steps)]
    problems = [*_mismatches(config, wanted), *_wrong_supports(config.sampling.top_k, wanted, top_k_of_journal)]
    return [f"{field}: {problem}" for problem in problems]


def _mismatches(config: RunConfig, steps: Sequence[StoredStep]) -> Iterator[str]:
    if pruned := [step.step for step in steps if step.num_whole < step.num_responses]:
        yield (
            f"the tokens of global steps {_ranges(pruned)} are no longer in it; give the journal of a run with "
            "collector.journal_keep_steps=0"
        )
    batch = config.batch
    for step in steps:
        sizes = step.num_groups, step.smallest_group, step.largest_group
        if sizes != (batch.num_prompts, batch.responses_per_prompt, batch.responses_per_prompt):
            yield (
                f"global step {step.step} consumed {step.num_groups} groups of {_from_to(*sizes[1:])} responses, but "
                f"this run has batch.num_prompts = {batch.num_prompts} and batch.responses_per_prompt = "
                f"{batch.responses_per_prompt}; set them as in the run that wrote it"
            )
            break
    for name, found in (
        ("prompt", max(step.longest_prompt for step in steps)),
        ("response", max(step.longest_response for step in steps)),
    ):
        limit = getattr(config.sampling, f"max_{name}_tokens")
        if found > limit:
            yield f"it has {name}s of up to {found} tokens; raise sampling.max_{name}_tokens = {limit}"
    replay = config.model.routing_replay
    if replay == "scored":
        yield "it holds no routes of scoring for model.routing_replay = scored; set that to none, or rollout"
    if replay == "rollout" and any(step.num_routes < step.num_responses for step in steps):
        yield (
            "it lacks the servers' routes for model.routing_replay = rollout; give the journal of a run with this "
            "setting and collector.journal_keep_routes=true, or set it to none"
        )


def _wrong_supports(top_k: int, steps: Sequence[StoredStep], top_k_of_journal: int | None) -> Iterator[str]:
    """`top_k_of_journal` is that of the run that wrote the steps, None if it is not known."""
    truncated = bool(top_k_of_journal) or any(step.num_supports for step in steps)
    pruned = [step.step for step in steps if step.num_supports < step.num_whole]
    if truncated and pruned:
        known = f" = {top_k_of_journal}" if top_k_of_journal else ""
        yield (
            f"its responses were sampled with sampling.top_k{known}, but the kept ids of global steps "
            f"{_ranges(pruned)} are no longer in it, and the behavior log-probs are those among them; give the "
            "journal of a run with collector.journal_keep_routes=true"
        )
    elif truncated and not top_k:
        yield (
            "its responses were sampled with sampling.top_k, and the behavior log-probs are those of the kept ids; set "
            "sampling.top_k as in the run that wrote it"
        )
    elif top_k and top_k_of_journal == 0:
        yield f"its run has sampling.top_k = 0, so there are no kept ids for sampling.top_k = {top_k}; set it to 0"
    elif top_k and pruned:
        yield (
            f"it lacks the kept ids of truncated sampling for sampling.top_k = {top_k}; give the journal of a run with "
            "this setting and collector.journal_keep_routes=true"
        )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, with consecutive ones joined.

    >>> _ranges([0, 1, 2, 5])
    '0 to 2, 5'
    """
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ", ".join(_from_to(start, end) for start, end in zip(starts, ends, strict=True))


def _from_to(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


class JournalFeed:
    """A BatchSource without servers: batch k is the one that step k of the stored run consumed, with its behavior
    log-probs.

    Nothing is published or evaluated. The journal is open only while a batch is read, so its run may continue.
    """

    def __init__(self, config: RunConfig, prompt_text: Callable[[np.ndarray], str]) -> None:
        """`prompt_text` converts a prompt's token ids to text, for the displayed samples. Raises UserError, with one
        line per problem, if the journal does not fit the settings."""
        if problems := journal_problems(config):
            raise UserError(problems)
        self._path = Path(config.debug.journal)
        self._prompt_text = prompt_text
        self._vocabulary_size = read_model_facts(config.model.hf_path).vocabulary_size
        self._routes, self._supports = config.model.routing_replay == "rollout", config.sampling.top_k > 0
        self._num_steps = config.num_global_steps
        self._num_prompts = config.batch.num_prompts

    def start(self, version: int) -> None:
        """Does nothing: a resumed run asks for later steps."""

    def batch(self, index: int) -> Batch:
        """The batch that global step `index` consumed. Raises JournalError if it is no longer there, UserError if it
        has tokens that this run's model does not know."""
        with JournalReader(self._path) as reader:
            stored = list(reader.groups("state = 'consumed' AND consumed_step = ?", (index,)))
            steps = [group.consumed_step for group in stored]
            if steps != [index] * self._num_prompts:  # because of a damaged index of the file
                raise JournalError(
                    f"{reader.path}: it has {steps.count(index)} of the {self._num_prompts} groups of global step "
                    f"{index}: the file is damaged, or was changed; give an undamaged copy of it"
                )
            # the collector's order; in delay mode it is the order of the ids
            stored.sort(key=lambda group: (group.issued_version, group.group_id))
            return Batch(index=index, groups=[self._group(reader, group, index) for group in stored])

    def scored(self, scores: BehaviorLogProbs) -> None:
        raise AssertionError("a journal's groups are scored")

    def consumed(self, trained: TrainedStep) -> None:
        """Does nothing: the journal does not change."""

    def release_begin(self, version: int) -> PublishLease:
        """A lease without servers, because there are none that have memory."""
        return PublishLease(version=version + 1, servers=[], evaluations=[], releases=True)

    def released(self, version: int, servers: Sequence[int]) -> None:
        assert not servers, "a journal has no servers"

    def publish_begin(self, version: int) -> PublishLease:
        """A lease without servers, because there are none to publish to."""
        return PublishLease(version=version, servers=[], evaluations=[])

    def publish_end(self, version: int, held_by: Sequence[int], late: Sequence[int] = ()) -> None:
        assert not held_by, "a journal has no servers"

    def checkpoint_begin(self, version: int) -> None:
        """Does nothing: the checkpoint relies on a journal that does not change."""

    def checkpoint_end(self, version: int) -> None:
        """Does nothing: nothing is pruned."""

    def finish(self) -> CollectorTotals:
        """The totals of the groups that were trained on."""
        with JournalReader(self._path) as reader:
            steps = [step for step in reader.steps().values() if step.step < self._num_steps]
        num_groups = sum(step.num_groups for step in steps)
        return CollectorTotals(
            groups_issued=num_groups,
            groups_consumed=num_groups,
            groups_dropped=0,
            groups_not_graded=0,
            smallest_staleness=min(step.smallest_staleness for step in steps),
            largest_staleness=max(step.largest_staleness for step in steps),
            versions_published=0,
            evaluations=[],
        )

    def close(self) -> None:
        """Does nothing: the journal is open only while it is read."""

    def _group(self, reader: JournalReader, group: StoredGroup, index: int) -> CollectedGroup:
        text = self._prompt_text(group.prompt_token_ids)
        issued = IssuedGroup(
            group_id=group.group_id,
            batch_index=index,
            policy_version=group.issued_version,
            prompt=Prompt(id=group.prompt_id, source=group.source, text=text, answer=""),  # the journal has no answers
            prompt_token_ids=group.prompt_token_ids,
            sampling_seeds=[response.sampling_seed for response in group.responses],
        )
        responses = [self._response(reader, group, response) for response in group.responses]
        self._refuse_unknown_tokens([group.prompt_token_ids, *(response.token_ids for response in responses)], group)
        return CollectedGroup(issued=issued, responses=responses)

    def _response(self, reader: JournalReader, group: StoredGroup, stored: StoredResponse) -> Response:
        tokens, versions, rollout = stored.token_ids, stored.policy_versions, stored.rollout_log_probs
        if tokens is None or versions is None or rollout is None or stored.behavior_log_probs is None:
            raise JournalError(f"{reader.path}: the tokens of group {group.group_id} are no longer in it")
        if stored.reward is None:
            raise JournalError(f"{reader.path}: group {group.group_id} was consumed without a reward: it is damaged")
        self._refuse_removed(reader, group, stored)
        return Response(
            token_ids=tokens,
            rollout_log_probs=rollout,
            policy_versions=versions,
            finish_reason=stored.finish_reason,
            reward=stored.reward,
            stored_routes=reader.stored_routes(group.group_id, stored) if self._routes else None,
            stored_supports=reader.stored_supports(group.group_id, stored) if self._supports else None,
            behavior_log_probs=stored.behavior_log_probs,
            loss_mask=stored.loss_mask,
            turns=stored.turns,
        )

    def _refuse_removed(self, reader: JournalReader, group: StoredGroup, stored: StoredResponse) -> None:
        """Raises JournalError for routes or kept ids that are missing: they were there when this run started."""
        needed = {"kept ids": (self._supports, stored.supports), "routes": (self._routes, stored.routes)}
        for what, (is_needed, place) in needed.items():
            if is_needed and place is None:
                raise JournalError(
                    f"{reader.path}: the {what} of group {group.group_id} (global step {group.consumed_step}) are no "
                    "longer in it: its run has removed them since this one started; give the journal of a run with "
                    "collector.journal_keep_routes=true"
                )

    def _refuse_unknown_tokens(self, token_ids: Sequence[np.ndarray], group: StoredGroup) -> None:
        ids = np.concatenate(token_ids)
        if ids.min() < 0 or ids.max() >= self._vocabulary_size:
            wrong = int(ids.max() if ids.min() >= 0 else ids.min())
            raise UserError(
                f"debug.journal = {self._path}: group {group.group_id} has the token id {wrong}, but the vocabulary of "
                f"model.hf_path has {self._vocabulary_size} tokens; give the model that sampled these rollouts"
            )
