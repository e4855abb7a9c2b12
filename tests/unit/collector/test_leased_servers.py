"""Servers whose weights the trainer may be changing: what they answer or give back waits for the verdict."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from minpro_megatron.collector.leases import Leases
from minpro_megatron.records import CollectedGroup
from tests.support.fake_engine import FakeEngine
from tests.support.rollout_fakes import no_evaluations
from tests.support.running_fleet import SAMPLING, Running, issued, run, running, until
from tests.support.sglang_answers import PROMPT, answer

TOKENS = ([7, 8, 258], [7, 8, 9, 10])


class Engine(FakeEngine):
    """Samples TOKENS, and goes on with them after what a prompt holds already. While `aborts`, it gives requests back
    with one token more."""

    def __init__(self, version: str = "0") -> None:
        super().__init__(version)
        self.aborts = False
        self.asked: list[int] = []  # tokens in the prompt of each request

    async def _generate(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        self.asked.append(len(body["input_ids"][0]))
        self.live |= set(body["rid"])
        await self.gate.wait()
        self.live -= set(body["rid"])
        return web.json_response(
            [self._answer(*each) for each in zip(body["rid"], body["input_ids"], TOKENS, strict=True)]
        )

    def _answer(self, request_id: str, prompt: list[int], tokens: list[int]) -> dict[str, Any]:
        rest = tokens[len(prompt) - len(PROMPT) :]
        made = answer(request_id, rest[:1] if self.aborts else rest, self.version, len(prompt))
        if self.aborts:
            made["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted", "status_code": None}
        return made


class Publication:
    """One of version 1 to both servers, as the collector leads it; each server has a group of version 0 under way."""

    def __init__(self, it: Running, engines: tuple[Engine, Engine]) -> None:
        self._it, self.engines = it, engines
        self._leases = Leases(it.fleet, [PROMPT], no_evaluations())

    async def begin(self) -> list[asyncio.Task[CollectedGroup]]:
        for engine in self.engines:
            engine.gate.clear()
        groups = [asyncio.create_task(self._it.groups.collect(issued(number), SAMPLING)) for number in range(2)]
        await until(lambda: all(len(engine.live) == 2 for engine in self.engines))
        self._leases.grant(1, requests_in_flight=True)
        return groups

    async def answer(self, *, aborts: bool, version: str) -> None:
        """Both servers answer what is under way; returns when whatever follows from it has come about."""
        for engine in self.engines:
            engine.version, engine.aborts = version, aborts
            engine.gate.set()
        await until(lambda: not any(engine.live for engine in self.engines))
        for _ in range(5):  # a round trip is as long as the way of an answer and of a request that follows it
            for member in self._it.fleet._members.values():
                await member.client.policy_version(5)
        for engine in self.engines:
            engine.aborts = False

    def end(self, held_by: list[int]) -> None:
        self._leases.end(held_by, first_time=True)


@asynccontextmanager
async def publishing(folder: Path) -> AsyncIterator[tuple[Running, Publication, list[asyncio.Task[CollectedGroup]]]]:
    """Two servers and a publication to them that has begun."""
    async with (
        Engine() as first,
        Engine() as second,
        running(folder, [first.url, second.url], mode="bounded") as it,
    ):
        publication = Publication(it, (first, second))
        yield it, publication, await publication.begin()


@pytest.mark.parametrize("version", ["0", "1"])
def test_what_a_server_answers_while_its_weights_change_counts_only_if_it_comes_back_with_them(
    tmp_path: Path, version: str
) -> None:
    """Whatever it calls its weights: it may have taken half of them, or wrong ones."""

    async def test() -> None:
        async with publishing(tmp_path) as (it, publication, groups):
            left_out, sound = publication.engines
            await publication.answer(aborts=False, version=version)
            assert not any(group.done() for group in groups)
            sound.version = "1"
            publication.end([1])
            found = [await group for group in groups]
            assert (left_out.asked, sound.asked) == ([3], [3, 3])
            assert [group.responses[0].policy_versions.tolist() for group in found] == [[1] * 3, [int(version)] * 3]
            assert it.metric("moved_groups") == 1

    run(test())


def test_what_an_update_aborts_goes_on_where_the_weights_have_come_and_nowhere_else(tmp_path: Path) -> None:
    async def test() -> None:
        async with publishing(tmp_path) as (it, publication, groups):
            left_out, sound = publication.engines
            await publication.answer(aborts=True, version="0")
            assert (left_out.asked, sound.asked) == ([3], [3])
            sound.version = "1"
            publication.end([1])
            moved, continued = [await group for group in groups]
            assert left_out.asked == [3]
            assert sorted(sound.asked) == [3, 3, 4]
            assert [response.token_ids.tolist() for response in moved.responses] == list(TOKENS)
            assert [response.policy_versions.tolist() for response in moved.responses] == [[1] * 3, [1] * 4]
            assert [response.token_ids.tolist() for response in continued.responses] == list(TOKENS)
            assert [response.policy_versions.tolist() for response in continued.responses] == [[0, 1, 1], [0, 1, 1, 1]]

            # it catches up, and has work again
            left_out.version = "1"
            publication._leases._not_before.clear()
            assert publication._leases.grant_again(1, requests_in_flight=True)
            assert publication._leases.current is not None
            assert [server.index for server in publication._leases.current.servers] == [0]
            again = asyncio.create_task(it.groups.collect(issued(2), SAMPLING))
            await again  # the other one is not leased
            publication._leases.end([0], first_time=False)
            await until(lambda: it.metric("current") == 2)
            await asyncio.gather(*(it.groups.collect(issued(number), SAMPLING) for number in (3, 4)))
            assert left_out.asked == [3, 3]

    run(test())


def test_a_leased_server_that_ends_keeps_no_group(tmp_path: Path) -> None:
    async def test() -> None:
        async with publishing(tmp_path) as (it, publication, groups):
            _, sound = publication.engines
            await publication.answer(aborts=True, version="0")
            it.withdraw(0)
            await until(lambda: it.metric("moved_groups") == 1)
            await until(lambda: sorted(sound.asked) == [3, 3])  # its answer waits like the others
            assert not any(group.done() for group in groups)
            publication.end([1])
            for group in groups:
                await group

    run(test())
