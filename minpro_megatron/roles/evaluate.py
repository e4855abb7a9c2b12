"""Sampling of an evaluation: samples the missing responses on the servers, grades them and writes them to a file."""

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import msgspec

from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import ProjectError, first_error
from minpro_megatron.evaluation.benchmarks import SAMPLES_PER_REQUEST
from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse, SampleFile
from minpro_megatron.fleet.episode_rules import episode_rules
from minpro_megatron.fleet.fleet import Fleet, start_limit_s
from minpro_megatron.fleet.generation import GroupCollector, graded_texts, texts_to_grade
from minpro_megatron.fleet.member import client_maker
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.prompts.prompts import TokenizedPrompt
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import IssuedGroup
from minpro_megatron.rewards.graders import Graders
from minpro_megatron.serving.answer_processes import AnswerProcesses
from minpro_megatron.serving.client import SamplingParameters
from minpro_megatron.serving.errors import ServerError

log = logging.getLogger(__name__)

# Interval of the checks for servers that have returned.
READMIT_INTERVAL_S = 2.0

Key = tuple[str, str, int]


class EvaluationError(ProjectError):
    """The evaluation cannot continue; the message is one line with the reason. The samples so far are kept."""


@dataclass(frozen=True, slots=True)
class Task:
    """Some samples of a benchmark's prompt: those from `first_sample` on, one for each of the group's seeds."""

    benchmark: str
    first_sample: int
    group: IssuedGroup

    @property
    def key(self) -> Key:
        return self.benchmark, self.group.prompt.id, self.first_sample


def plan(
    prompts: Mapping[str, Sequence[TokenizedPrompt]], samples: Mapping[str, int], seed: int, done: Collection[Key] = ()
) -> list[Task]:
    """The samples that are not in `done`, benchmark by benchmark. Seeds depend only on (seed, benchmark, prompt's id,
    sample)."""
    tasks: list[Task] = []
    for name, tokenized in prompts.items():
        for prompt in tokenized:
            for first in range(0, samples[name], SAMPLES_PER_REQUEST):
                places = range(first, min(first + SAMPLES_PER_REQUEST, samples[name]))
                group = IssuedGroup(
                    group_id=len(tasks),
                    batch_index=-1,
                    policy_version=0,
                    prompt=prompt.prompt,
                    prompt_token_ids=prompt.token_ids,
                    sampling_seeds=[derive_seed(seed, f"benchmark/{name}/{prompt.prompt.id}", i) for i in places],
                    is_evaluation=True,
                )
                tasks.append(Task(name, first, group))
    left_out = set(done)
    return [task for task in tasks if task.key not in left_out]


class Sampler:
    """Samples tasks on the servers whose addresses `serve` writes into the run folder, and grades the responses."""

    def __init__(
        self,
        config: RunConfig,
        incarnation: int,
        file: SampleFile,
        sampled: Callable[[SampledGroup], None],
        ready: Callable[[], None],
    ) -> None:
        """`sampled` is called with each group after it is in `file`, `ready` once, when the servers are ready."""
        self._config = config
        self._incarnation = incarnation
        self._file = file
        self._sampled = sampled
        self._ready = ready
        self._facts = read_model_facts(config.model.hf_path, config.sampling.extra_stop_tokens)
        self._tokenizer = TextTokenizer(config.model.hf_path, self._facts)
        self._sampling = SamplingParameters(
            config.evaluation.temperature, config.sampling.max_response_tokens, config.evaluation.top_p
        )

    async def run(self, tasks: Sequence[Task], sampled_version: int | None) -> None:
        """Samples all tasks. `sampled_version`: policy version of the existing samples.

        Raises EvaluationError, FleetError or GenerationError.
        """
        async with AsyncExitStack() as stack:
            graders = await stack.enter_async_context(Graders(self._config.reward))
            answers = stack.enter_context(AnswerProcesses(self._facts))
            make_client = client_maker(self._config, self._facts, answers.check)
            fleet = await stack.enter_async_context(Fleet(self._config, self._facts, self._incarnation, make_client))
            await fleet.wait_until_ready(start_limit_s(self._config.server))
            version = await self._served_version(fleet)
            if sampled_version not in (None, version):
                raise EvaluationError(
                    f"the servers hold version {version} of the weights, the samples in {self._file.path} are of "
                    f"version {sampled_version}: give another --output"
                )
            self._ready()
            episodes = await episode_rules(self._config, self._facts, self._tokenizer, stack)
            groups = GroupCollector(fleet, graders, self._tokenizer, episodes)
            try:
                async with asyncio.TaskGroup() as running:
                    readmitting = running.create_task(self._readmit(fleet, version))
                    pending = [running.create_task(self._sample(task, version, groups, graders)) for task in tasks]
                    await asyncio.gather(*pending)
                    readmitting.cancel()
            except ExceptionGroup as failures:  # they fail together: one cause is reported
                raise first_error(failures) from None

    async def _served_version(self, fleet: Fleet) -> int:
        """The version of all servers' weights, for which `fleet` then assigns work."""
        make_client = client_maker(self._config, self._facts)
        versions = {}
        for address in fleet.members():
            async with make_client(address) as client:
                try:
                    versions[address.url] = await client.policy_version(self._config.server.unhealthy_after_s)
                except ServerError as error:
                    raise EvaluationError(
                        f"{error}; a server of --urls must report the version of its weights: start it with "
                        "--weight-version 0"
                    ) from None
        if len(set(versions.values())) != 1:
            raise EvaluationError(f"the servers have different weights ({versions}): use servers with one version")
        version = next(iter(versions.values()))
        if version != fleet.version:
            fleet.set_version(version, [address.index for address in fleet.members()])
        return version

    async def _readmit(self, fleet: Fleet, version: int) -> None:
        """Readmits external servers that have returned and still have the same weights."""
        loop = asyncio.get_running_loop()
        seen_at = loop.time()
        while True:
            await asyncio.sleep(READMIT_INTERVAL_S)
            if fleet.outdated():
                fleet.set_version(version, [address.index for address in fleet.members()])
            if fleet.metrics()["fleet/current"]:
                seen_at = loop.time()
            elif loop.time() - seen_at > self._config.server.start_timeout_s:
                raise EvaluationError(
                    f"no server has held version {version} of the weights for server.start_timeout_s = "
                    f"{self._config.server.start_timeout_s:g} s; run the same command again when one is available"
                )

    async def _sample(self, task: Task, version: int, groups: GroupCollector, graders: Graders) -> None:
        prompt = task.group.prompt
        issued = msgspec.structs.replace(task.group, policy_version=version)
        sequences = await groups.sample(issued, self._sampling)
        texts = await groups.response_texts(sequences)
        judged = await graders.judge(prompt, texts_to_grade(graded_texts(prompt, texts), sequences))
        group = SampledGroup(
            benchmark=task.benchmark,
            policy_version=version,
            prompt_id=prompt.id,
            first_sample=task.first_sample,
            responses=[
                SampledResponse(
                    text=text,
                    num_tokens=len(sequence.token_ids),
                    finish_reason=sequence.finish_reason,
                    reward=None if sequence.failure else found.reward,
                    extracted=found.extracted,
                    problem=sequence.failure or found.problem,
                    turns=list(sequence.turns),
                )
                for text, sequence, found in zip(texts, sequences, judged, strict=True)
            ],
        )
        self._file.append(group)
        self._sampled(group)
