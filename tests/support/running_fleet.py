"""A fleet over servers at given addresses, its groups, and waiting for what it does."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minpro_megatron.config.run import RunConfig
from minpro_megatron.fleet.fleet import Fleet
from minpro_megatron.fleet.generation import GroupCollector
from minpro_megatron.records import CollectedGroup, IssuedGroup, Prompt, ServerAddress
from minpro_megatron.rewards.graders import SampledText
from minpro_megatron.rewards.judging import Judged
from minpro_megatron.serving.client import SamplingParameters
from minpro_megatron.serving.endpoints import remove_server_address, write_server_address
from tests.support import faulty_proxy
from tests.support.rollout_fakes import run_config
from tests.support.sglang_answers import FACTS, PROMPT

SAMPLING = SamplingParameters(1.0, 4)
INCARNATION = 1
WATCH_INTERVAL_S = 0.005
SERVER = {"request_timeout_s": 60, "health_interval_s": 0.02, "unhealthy_after_s": 5, "max_running_requests": 16}


class FakeRewards:
    async def judge(
        self, prompt: Prompt, responses: Sequence[SampledText], stop_at_failure: bool = False
    ) -> list[Judged]:
        return [Judged(float(len(response.text))) for response in responses]


class FakeTokenizer:
    def response_texts(self, responses: Sequence[Any]) -> list[str]:
        return ["x" * len(token_ids) for token_ids in responses]


def config(run_dir: Path, count: int, mode: str = "delay", **server: object) -> RunConfig:
    values = run_config(run_dir).model_dump()
    values["server"] |= SERVER | {"count": count} | server
    values["staleness"]["mode"] = mode
    return RunConfig.model_validate(values)


def issued(group_id: int, version: int = 0) -> IssuedGroup:
    return IssuedGroup(
        group_id=group_id,
        batch_index=0,
        policy_version=version,
        prompt=Prompt(id=f"p{group_id}", source="test", text="1=", answer="1"),
        prompt_token_ids=np.asarray(PROMPT, dtype=np.int32),
        sampling_seeds=[2 * group_id, 2 * group_id + 1],
    )


class Running:
    """A fleet over servers at these addresses, and its groups."""

    def __init__(self, settings: RunConfig, fleet: Fleet) -> None:
        self.settings, self.fleet = settings, fleet
        self.groups = GroupCollector(fleet, FakeRewards(), FakeTokenizer())  # type: ignore[arg-type]

    def state(self, index: int, url: str, start: int = 0) -> None:
        address = ServerAddress(index=index, url=url, tensor_parallel=1, start=start)
        write_server_address(self.settings.run_dir, address, INCARNATION)

    def withdraw(self, index: int) -> None:
        remove_server_address(self.settings.run_dir, index, INCARNATION)

    async def collect(self, count: int = 1, version: int = 0, first: int = 0) -> list[CollectedGroup]:
        """Groups, each checked: every token with its version and a sound log-prob."""
        collected = await asyncio.gather(
            *(self.groups.collect(issued(first + number, version), SAMPLING) for number in range(count))
        )
        for number, group in enumerate(collected):
            assert group.issued.group_id == first + number
            assert [response.token_ids.tolist() for response in group.responses] == [[7, 8, 258], [7, 8, 9, 10]]
            assert group.responses[1].rollout_log_probs.tolist() == [-0.5, -1.0, -1.5, -2.0]
            assert all((response.policy_versions >= version).all() for response in group.responses)
        return list(collected)

    async def publish(self, version: int, held_by: list[int], num_current: int | None = None) -> None:
        """Names the servers that hold `version`, and waits until they are found to do so."""
        self.fleet.set_version(version, held_by)
        await until(lambda: self.metric("current") == (len(held_by) if num_current is None else num_current))

    def metric(self, name: str) -> float:
        return self.fleet.metrics().get(f"fleet/{name}", 0.0)


@asynccontextmanager
async def running(tmp_path: Path, urls: Sequence[str], **settings: Any) -> AsyncIterator[Running]:
    made = config(tmp_path, max(1, len(urls)), **settings)
    async with Fleet(made, FACTS, INCARNATION, watch_interval_s=WATCH_INTERVAL_S) as fleet:
        it = Running(made, fleet)
        for index, url in enumerate(urls):
            it.state(index, url)
        if urls:
            await fleet.wait_until_ready(30)
        yield it


async def until(condition: Callable[[], object], limit_s: float = 30.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.002)


def run(test: Awaitable[None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await test

    asyncio.run(main())


FAULTS = {
    "dropped": (faulty_proxy.dropped, "failures/connection"),
    "http_500": (faulty_proxy.internal_error, "failures/status"),
    "truncated": (faulty_proxy.truncated, "invalid_answers/body"),
    "nan": (faulty_proxy.changed(faulty_proxy.nan_log_prob), "invalid_answers/body"),
    "short": (faulty_proxy.changed(faulty_proxy.one_token_short), "invalid_answers/completion_tokens"),
    "stale": (faulty_proxy.changed(faulty_proxy.stale_version), "invalid_answers/weight_versions"),
    "exchanged": (faulty_proxy.changed(faulty_proxy.exchanged), "invalid_answers/id"),
    "hang": ("hang", "failures/timeout"),
    "drip": ("drip", "failures/timeout"),
}
