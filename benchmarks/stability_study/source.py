"""Servers and collector of a run in the trainer's own process: the same schedule, prompts, seeds, checks and rewards.

buffer.schedule decides what is sampled, with which version, and when weights may be replaced, as in the collector.
Only HTTP, the journal and waiting are omitted.
"""

import asyncio
import time
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from benchmarks.stability_study.batched_model import BatchedModel
from benchmarks.stability_study.curves import append_responses
from minpro_megatron.buffer.schedule import make_schedule
from minpro_megatron.buffer.scores import check_scores, with_scores
from minpro_megatron.buffer.staleness import evaluated_versions, expected_staleness, staleness
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.sampling import SamplingConfig
from minpro_megatron.evaluation.sampling import append_result, evaluate, evaluation_groups
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.prompts.prompts import PromptStream, TokenizedPrompt, load_prompts, tokenize
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.publishing.gather import WeightGatherer
from minpro_megatron.publishing.publish import Publisher, PublishReport, ScoreCanaries
from minpro_megatron.records import (
    Batch,
    BehaviorLogProbs,
    CollectedGroup,
    CollectorTotals,
    EvaluationResult,
    IssuedGroup,
    PublishLease,
    Response,
    TrainedStep,
)
from minpro_megatron.reference_engine.model import Model
from minpro_megatron.rewards.registry import Grade, load_response_reward


class GroupSampler:
    """Groups sampled and rewarded with the weights of one policy version; every token of a group has that version."""

    def __init__(self, config: RunConfig, tokenizer: TextTokenizer) -> None:
        self._sampling: SamplingConfig = config.sampling
        self._stops = read_model_facts(config.model.hf_path, config.sampling.extra_stop_tokens).stop_token_ids
        self._tokenizer = tokenizer
        self._reward = load_response_reward(config.reward.function)
        longest = config.sampling.max_prompt_tokens + config.sampling.max_response_tokens
        architecture = read_architecture(config.model.hf_path)
        self._model = BatchedModel(Model.from_hf(architecture, config.model.hf_path, longest), longest)
        self.version = 0

    def load(self, tensors: Sequence[tuple[str, Tensor]], version: int) -> None:
        self._model.load(tensors)
        self.version = version

    def collect(self, groups: Sequence[IssuedGroup], temperature: float) -> list[CollectedGroup]:
        prompts = [group.prompt_token_ids.tolist() for group in groups for _ in group.sampling_seeds]
        seeds = [seed for group in groups for seed in group.sampling_seeds]
        sampled = iter(self._model.sample(prompts, seeds, temperature, self._sampling.max_response_tokens, self._stops))
        collected = []
        for group in groups:
            assert group.policy_version == self.version, "a group of a different version from the weights"
            responses = [next(sampled) for _ in group.sampling_seeds]
            texts = self._tokenizer.response_texts([response.token_ids for response in responses])
            collected.append(
                CollectedGroup(
                    issued=group,
                    responses=[
                        Response(
                            token_ids=response.token_ids,
                            rollout_log_probs=response.log_probs,
                            policy_versions=np.full(len(response.token_ids), self.version, np.int32),
                            finish_reason=response.finish_reason,
                            reward=self._graded(group.prompt.prefix + text, group.prompt.answer),
                        )
                        for response, text in zip(responses, texts, strict=True)
                    ],
                )
            )
        return collected

    def _graded(self, text: str, answer: str) -> float:
        found = self._reward(text, answer)
        return found.reward if isinstance(found, Grade) else found


class SamplerPublisher(Publisher):
    """Publishes to the sampler of this process."""

    def __init__(
        self,
        config: RunConfig,
        gatherer: WeightGatherer,
        mesh: Mesh,
        score_canaries: ScoreCanaries,
        sampler: GroupSampler,
    ) -> None:
        super().__init__(config, gatherer, mesh, score_canaries)
        self._sampler = sampler

    def publish(self, lease: PublishLease | None, changed: bool) -> PublishReport | None:
        assert lease is not None, "one rank"
        start = time.monotonic()
        buckets = self._gatherer.buckets(self._config.publish.bucket_bytes)
        self._sampler.load([pair for bucket in buckets for pair in bucket], lease.version)
        return PublishReport(
            version=lease.version,
            held_by=[],
            failures={},
            transport=None,
            total_s=time.monotonic() - start,
            paused_s=0.0,
            transfer_s=0.0,
            num_bytes=0,
            checksum="",
            canaries={},
        )


class SamplerSource:
    """A BatchSource (minpro_megatron.feed.batch_source) over a GroupSampler, for runs in delay mode."""

    def __init__(self, config: RunConfig, sampler: GroupSampler, tokenizer: TextTokenizer) -> None:
        if config.staleness.mode != "delay" or config.batch.dynamic_sampling:
            raise ValueError(
                f"staleness.mode = {config.staleness.mode}, batch.dynamic_sampling = {config.batch.dynamic_sampling}: "
                "in one process only delay mode without a filter is run; launch the run for others"
            )
        longest = config.sampling.max_prompt_tokens
        training = load_prompts(config.data.train_file, "data.train_file")
        heldout = load_prompts(config.data.heldout_file, "data.heldout_file")[: config.evaluation.num_prompts]
        self._config = config
        self._sampler = sampler
        self._stream = PromptStream(tokenize(training, tokenizer, longest, "data.train_file"), config)
        self._heldout: list[TokenizedPrompt] = tokenize(heldout, tokenizer, longest, "data.heldout_file")
        self._schedule = make_schedule(config)
        self._evaluated_versions = set(evaluated_versions(config.num_global_steps, config.evaluation.every_steps))
        self._evaluations: list[EvaluationResult] = []
        self._groups: dict[int, CollectedGroup] = {}
        self._num_issued = 0
        self._staleness: list[int] = []

    def start(self, version: int) -> None:
        assert version == 0, "a run is started again, not resumed"
        self._serve()

    def batch(self, index: int) -> Batch:
        chosen = self._schedule.batch(index)
        assert chosen is not None, f"batch {index} is not sampled by version {self._schedule.version}"
        return Batch(index=index, groups=[self._groups[group_id] for group_id in chosen.group_ids])

    def scored(self, scores: BehaviorLogProbs) -> None:
        batch = self.batch(scores.index)
        check_scores(batch, scores)
        for group, log_probs in zip(batch.groups, scores.log_probs, strict=True):
            self._groups[group.issued.group_id] = with_scores(group, log_probs)

    def consumed(self, trained: TrainedStep) -> None:
        batch = self.batch(trained.step)
        for group in batch.groups:
            assert group.is_scored, "a batch without behavior log-probs"
            found = staleness(trained.policy_version, group.oldest_version)
            assert found == expected_staleness(trained.step, self._config.staleness.delay_steps)
            self._staleness.append(found)
            del self._groups[group.issued.group_id]
        self._schedule.consumed(trained.step)
        responses = (response.token_ids for group in batch.groups for response in group.responses)
        append_responses(self._config.run_dir, trained.step, responses)

    def publish_begin(self, version: int) -> PublishLease:
        assert version == self._schedule.version + 1
        assert self._schedule.may_publish()
        return PublishLease(version=version, servers=[], evaluations=list(self._evaluations))

    def publish_end(self, version: int, held_by: Sequence[int], late: Sequence[int] = ()) -> None:
        self._schedule.published()
        self._serve()

    def checkpoint_begin(self, version: int) -> None:
        raise AssertionError("checkpoint.every_steps is 0")

    def checkpoint_end(self, version: int) -> None:
        raise AssertionError("checkpoint.every_steps is 0")

    def finish(self) -> CollectorTotals:
        return CollectorTotals(
            groups_issued=self._num_issued,
            groups_consumed=len(self._staleness),
            groups_dropped=0,
            groups_not_graded=0,
            smallest_staleness=min(self._staleness),
            largest_staleness=max(self._staleness),
            versions_published=self._schedule.version,
            evaluations=list(self._evaluations),
        )

    def close(self) -> None:
        """Does nothing: there is nothing to close."""

    def _serve(self) -> None:
        """Samples everything that is due with the current version: held-out prompts and batches."""
        version = self._schedule.version
        assert self._sampler.version == version
        if version in self._evaluated_versions:
            self._evaluate(version)
        issued = [self._stream.group(*slot) for slot in self._schedule.to_issue()]
        self._num_issued += len(issued)
        for group in self._sampler.collect(issued, self._config.sampling.temperature) if issued else []:
            self._groups[group.issued.group_id] = group
            self._schedule.collected(group.issued.group_id, accepted=True)

    def _evaluate(self, version: int) -> None:
        settings = self._config.evaluation
        prompts = [(tokenized.prompt, tokenized.token_ids) for tokenized in self._heldout]
        size = settings.samples_per_prompt
        groups = evaluation_groups(prompts, size, self._config.seed, version, max_group_size=size)
        collected = iter(self._sampler.collect(groups, settings.temperature))

        async def already(_: IssuedGroup) -> CollectedGroup:
            return next(collected)

        result = asyncio.run(evaluate(groups, already))
        append_result(self._config.run_dir, result)
        self._evaluations.append(result)
