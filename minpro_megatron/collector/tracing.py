"""The collector's part of a trace (monitor/trace.py): groups on their servers, grading, publications, evaluations.

Groups are recorded by wrapping the servers' clients and the function that collects a group, the rest by an observer of
the collector (collector/events.py). Only a traced run has them.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np

from minpro_megatron.collector.events import CollectorObserver
from minpro_megatron.config.run import RunConfig
from minpro_megatron.evaluation.in_run import CollectGroup
from minpro_megatron.fleet.member import Client
from minpro_megatron.monitor.trace import Recorder
from minpro_megatron.records import CollectedGroup, IssuedGroup, ServerAddress
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


def traced_groups(collect_group: CollectGroup, recorder: Recorder) -> CollectGroup:
    """Wraps `collect_group`; in the trace a group is named by what it is sampled for and its number."""

    async def collect(issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        kind = "held-out prompt" if issued.is_evaluation else "group"
        work = _Work(f"{kind} {issued.group_id}", recorder.now())
        _work.set(work)  # seen only by the tasks that this one starts
        group = await collect_group(issued, sampling)
        if work.generated is not None:
            recorder.add(work.name, work.generated, recorder.now(), track="decoding and grading", parallel=True)
        return group

    return collect


class TracingObserver(CollectorObserver):
    """Records the publications, the evaluations and the version being served."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._requested: dict[int, int] = {}  # by version: when the trainer first requested its lease
        self._granted: dict[int, int] = {}
        self._evaluated: dict[tuple[int, str], int] = {}  # when the evaluation started

    def resumed(self, version: int) -> None:
        self._recorder.step(version)

    def lease_requested(self, version: int) -> None:
        self._requested.setdefault(version, self._recorder.now())

    def lease_granted(self, version: int) -> None:
        if version in self._granted:
            return
        self._granted[version] = now = self._recorder.now()
        if version in self._requested:
            name = f"version {version} waits for work in flight"
            self._recorder.add(name, self._requested[version], now, track="publication")

    def published(self, version: int, held_by: Sequence[int]) -> None:
        now = self._recorder.now()
        granted = self._granted.pop(version, now)
        self._recorder.add(f"publish version {version}", granted, now, track="publication", held_by=list(held_by))
        self._requested.pop(version, None)
        self._recorder.step(version)

    def evaluation_started(self, version: int, name: str) -> None:
        self._evaluated[version, name] = self._recorder.now()

    def evaluation_ended(self, version: int, name: str) -> None:
        start, shown = self._evaluated.pop((version, name)), f"evaluate version {version}"
        self._recorder.add(
            f"{shown} on {name}" if name else shown, start, self._recorder.now(), track="evaluation", parallel=True
        )
