"""A collector with a real journal, and a trainer that may crash between any two requests."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.step_order import Fetch, Publish, Release, Save, StepOrder, Train, steps_ahead
from minpro_megatron.collector.collector import Collector
from minpro_megatron.config.run import RunConfig
from minpro_megatron.prompts.prompts import PromptStream
from minpro_megatron.records import Batch, CollectorTotals, PublishLease
from tests.support.rollout_fakes import FakeServers, scores_of, tokenized_prompts, trained

TIMEOUT_S = 5.0


class Crash(Exception):
    """The trainer's process ends here, and with it the run."""


@asynccontextmanager
async def collecting(
    config: RunConfig, servers: FakeServers, version: int = 0, prompts: int = 7, former_end: int | None = None
) -> AsyncIterator[Collector]:
    """A collector that goes on from the checkpoint of `version`. At the end it is killed, whatever it is doing; if it
    has failed by itself, that is raised."""
    journal = await Journal.open(config.run_dir)
    try:
        stream = PromptStream(tokenized_prompts(prompts), config)
        collector = Collector(config, journal, stream, tokenized_prompts(2), servers.collect, servers)
        await collector.restore(version, former_end)
        running = asyncio.create_task(_run(collector))
        try:
            yield collector
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
    finally:
        await journal.close()


async def _run(collector: Collector) -> None:
    """As the role collect does."""
    try:
        await collector.run()
    except Exception as error:
        await collector.fail(str(error))
        raise


class FakeTrainer:
    """Trains through a run, in as many incarnations as it takes: `await run(...)` is one of them."""

    def __init__(self, config: RunConfig, checkpoint_every: int = 2) -> None:
        self._config = config
        self._every = checkpoint_every
        self.checkpoint: int | None = None  # the version to go on from
        self.num_requests = 0
        self.trained: dict[int, Batch] = {}
        self.leases: list[PublishLease] = []
        self.refused_by: set[int] = set()  # servers that do not take weights

    async def run(self, collector: Collector, crash_at: int | None = None) -> CollectorTotals:
        """The totals. Raises Crash instead of making request number `crash_at`."""
        self._collector, self._crash_at, self.num_requests = collector, crash_at, 0
        self._ready: dict[int, Batch] = {}
        first = self.checkpoint or 0
        ahead, in_turns = steps_ahead(self._config.staleness), self._config.server.takes_turns
        order = StepOrder(self._config.num_global_steps, ahead, first, in_turns)
        self._request()
        collector.start(first)
        if self.checkpoint is not None and in_turns:
            await self._release(first)
        if self.checkpoint is not None or self._config.publishes_at_start:
            await self._publish(first)
        for fetch in order.before_first_step():
            await self._fetch(fetch.batch)
        for step in order.steps:
            for event in order.of_step(step):
                match event:
                    case Release(version):
                        await self._release(version)
                    case Fetch():
                        await self._fetch(event.batch)
                    case Train():
                        self.trained[step] = self._ready.pop(step)
                        self._request()
                        await collector.consumed(trained(step))
                    case Publish(version):
                        await self._publish(version)
                    case Save(version):
                        await self._save(version)
        totals = await self._answer(lambda: collector.finish(TIMEOUT_S))
        assert isinstance(totals, CollectorTotals)
        return totals

    def _request(self) -> None:
        if self.num_requests == self._crash_at:
            raise Crash
        self.num_requests += 1

    async def _answer[Answer](
        self, ask: Callable[[], Awaitable[Answer | PublishLease | None]], version: int = -1
    ) -> Answer | PublishLease:
        """What was asked for, after the current weights were sent to servers that have lost them."""
        while True:
            self._request()
            answer = await ask()
            assert answer is not None, "no answer in time"
            if not isinstance(answer, PublishLease) or answer.version == version:
                return answer
            await self._send(answer)

    async def _fetch(self, index: int) -> None:
        batch = await self._answer(lambda: self._collector.batch(index, TIMEOUT_S))
        assert isinstance(batch, Batch)
        self._ready[index] = batch
        if not all(group.is_scored for group in batch.groups):
            self._request()
            exact = self._config.staleness.mode == "delay"
            await self._collector.scored(scores_of(batch, None if exact else -1))

    async def _release(self, version: int) -> None:
        while True:
            self._request()
            lease = await self._collector.release_begin(version, TIMEOUT_S)
            assert lease is not None, "no lease in time"
            if lease.releases:
                break
            await self._send(lease)
        self._request()
        released = [server.index for server in lease.servers if server.index not in self.refused_by]
        await self._collector.released(lease.version, released)

    async def _publish(self, version: int) -> None:
        lease = await self._answer(lambda: self._collector.publish_begin(version, TIMEOUT_S), version)
        assert isinstance(lease, PublishLease)
        await self._send(lease)

    async def _send(self, lease: PublishLease) -> None:
        self.leases.append(lease)
        self._request()
        held_by = [server.index for server in lease.servers if server.index not in self.refused_by]
        await self._collector.publish_end(lease.version, held_by)

    async def _save(self, version: int) -> None:
        if version % self._every:
            return
        self._request()
        await self._collector.checkpoint_begin(version)
        self.checkpoint = version  # complete on disk, whether the collector hears of it or not
        self._request()
        await self._collector.checkpoint_end(version)


class HeldServers(FakeServers):
    """Holds groups until they are let go."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.let_go = asyncio.Event()

    async def collect(self, issued, sampling):
        await self.let_go.wait()
        return await super().collect(issued, sampling)


def contents(batch: Batch) -> list[tuple]:
    """All that decides what a batch teaches, but for its scores."""
    return [
        (
            group.issued.group_id,
            group.issued.prompt.id,
            group.issued.sampling_seeds,
            [(r.token_ids.tolist(), r.policy_versions.tolist(), r.reward) for r in group.responses],
        )
        for group in batch.groups
    ]
