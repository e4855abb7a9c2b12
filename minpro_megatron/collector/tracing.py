"""The collector's part of a trace (monitor/trace.py): groups on their servers, grading, publications, evaluations.

All of it wraps the collector and its clients, and is installed only for a traced run.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.collector.collector import Collector
from minpro_megatron.collector.leases import Servers
from minpro_megatron.config.run import RunConfig
from minpro_megatron.evaluation.in_run import CollectGroup, EvaluationSet
from minpro_megatron.fleet.member import Client
from minpro_megatron.monitor.trace import Recorder
from minpro_megatron.prompts.prompts import PromptStream, TokenizedPrompt
from minpro_megatron.records import CollectedGroup, IssuedGroup, PublishLease, ServerAddress
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters

PROCESS = "collector"


@dataclass
class _Work:
    """The group that a task samples."""

    name: str
    began: int
    generated: int | None = None  # the time when its last response had arrived


_work: ContextVar[_Work] = ContextVar("work")


def collector_recorder(config: RunConfig, incarnation: int) -> Recorder | None:
    """The recorder of the collector's process; None if the run is not traced."""
    if not config.debug.traced:
        return None
    return Recorder(config.run_dir, incarnation, PROCESS, config.debug.traced, of_step="serving version")


class TracedClient:
    """A server's client that records every group as a span of that server."""

    def __init__(self, client: Client, recorder: Recorder, server: int) -> None:
        self.name = client.name
        self._client = client
        self._recorder = recorder
        self._process = f"server {server}"

    async def __aenter__(self) -> "TracedClient":
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.__aexit__(*error)

    async def policy_version(self, timeout_s: float) -> int:
        return await self._client.policy_version(timeout_s)

    async def generates(self, timeout_s: float) -> bool:
        return await self._client.generates(timeout_s)

    async def generate(
        self,
        prompt_token_ids: np.ndarray,
        seeds: Sequence[int],
        sampling: SamplingParameters,
        policy_version: int,
        before_continuing: Callable[[], Awaitable[object]],
    ) -> list[SampledSequence]:
        work, start, tokens = _work.get(), self._recorder.now(), 0
        try:
            sequences = await self._client.generate(
                prompt_token_ids, seeds, sampling, policy_version, before_continuing
            )
            tokens = sum(len(sequence.token_ids) for sequence in sequences)
            return sequences
        finally:
            work.generated = self._recorder.now()
            self._recorder.add(
                work.name, start, work.generated, process=self._process, track="generation", parallel=True,
                version=policy_version, responses=len(seeds), tokens=tokens,
                waited_s=round((start - work.began) / 1e9, 4),
            )  # fmt: skip


def traced_clients(
    make_client: Callable[[ServerAddress], Client], recorder: Recorder
) -> Callable[[ServerAddress], Client]:
    return lambda address: TracedClient(make_client(address), recorder, address.index)


def traced_groups(collect_group: CollectGroup, recorder: Recorder, kind: str) -> CollectGroup:
    """Wraps `collect_group`; in the trace a group is named by `kind` and its number."""

    async def collect(issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        work = _Work(f"{kind} {issued.group_id}", recorder.now())
        _work.set(work)  # seen only by the tasks that this one starts
        group = await collect_group(issued, sampling)
        if work.generated is not None:
            recorder.add(work.name, work.generated, recorder.now(), track="decoding and grading", parallel=True)
        return group

    return collect


class TracedCollector(Collector):
    """A collector that records its publications, its evaluations and the version being served."""

    def __init__(
        self,
        recorder: Recorder,
        config: RunConfig,
        journal: Journal,
        stream: PromptStream,
        heldout: Sequence[TokenizedPrompt],
        collect_group: CollectGroup,
        servers: Servers,
        benchmarks: Sequence[EvaluationSet] = (),
        grading_metrics: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        evaluated = traced_groups(collect_group, recorder, "held-out prompt")
        super().__init__(config, journal, stream, heldout, evaluated, servers, benchmarks, grading_metrics)
        self._collect_group = traced_groups(collect_group, recorder, "group")
        self._recorder = recorder
        self._asked: dict[int, int] = {}  # by version: when the trainer first requested its lease
        self._granted: dict[int, int] = {}

    async def restore(self, version: int, former_end: int | None = None) -> None:
        await super().restore(version, former_end)
        self._recorder.step(version)

    async def publish_begin(self, version: int, timeout_s: float) -> PublishLease | None:
        asked = self._asked.setdefault(version, self._recorder.now())
        lease = await super().publish_begin(version, timeout_s)
        if lease is not None and lease.version == version and version not in self._granted:
            self._granted[version] = self._recorder.now()
            name = f"version {version} waits for work in flight"
            self._recorder.add(name, asked, self._granted[version], track="publication")
        return lease

    async def publish_end(self, version: int, held_by: Sequence[int], late: Sequence[int] = ()) -> None:
        await super().publish_end(version, held_by, late)
        now = self._recorder.now()
        granted = self._granted.pop(version, now)
        self._recorder.add(f"publish version {version}", granted, now, track="publication", held_by=list(held_by))
        self._asked.pop(version, None)
        self._recorder.step(version)

    def _republish_due(self) -> bool:
        due = super()._republish_due()
        if due:
            self._granted.setdefault(self._version, self._recorder.now())
        return due

    async def _evaluate(self, chosen: EvaluationSet, version: int) -> None:
        start = self._recorder.now()
        await super()._evaluate(chosen, version)
        name = f"evaluate version {version}" + (f" on {chosen.name}" if chosen.name else "")
        self._recorder.add(name, start, self._recorder.now(), track="evaluation", parallel=True)
