"""A reward service with faults: it grades like the reward calculator, and sometimes fails in one of the ways in which
services fail."""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from aiohttp import web

from minpro_megatron.rewards.calculator import grade

Fault = Callable[[web.Request, list[float]], Awaitable[web.StreamResponse]]


async def delayed(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    """Slow, but in time."""
    await asyncio.sleep(0.3)
    return web.json_response({"rewards": rewards})


async def late(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    """The right answer, after the time of an attempt."""
    await asyncio.sleep(LATE_S)
    return web.json_response({"rewards": rewards})


async def dropped(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def half(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    """The connection is dropped after half of the answer."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"rewards": [')
    assert request.transport is not None
    request.transport.close()
    return response


async def internal_error(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    return web.Response(status=500, text="the judge is out of memory")


async def not_a_number(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    return web.Response(text='{"rewards": [' + ", ".join(["NaN"] * len(rewards)) + "]}")


async def infinite(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    return web.Response(text='{"rewards": [' + ", ".join(["1e999"] * len(rewards)) + "]}")


async def garbage(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    return web.Response(body=b"\xff\x00<html>gateway</html>")


async def nested(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    return web.Response(text='{"new": ' + "[" * 20000)


async def too_few(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    return web.json_response({"rewards": rewards[:-1]})


async def texts(request: web.Request, rewards: list[float]) -> web.StreamResponse:
    return web.json_response({"rewards": [str(reward) for reward in rewards]})


FAULTS: dict[str, Fault] = {
    function.__name__: function
    for function in (
        delayed,
        late,
        dropped,
        half,
        internal_error,
        not_a_number,
        infinite,
        garbage,
        nested,
        too_few,
        texts,
    )
}
LATE_S = 2.0


class RewardService:
    """Answers in a thread of its own. `share` of the requests fail, evenly spread, in the ways of `faults` by turns."""

    def __init__(self, share: float = 0.0, faults: Sequence[str] = tuple(FAULTS)) -> None:
        self.share, self.faults = share, list(faults)
        self.received: list[dict[str, Any]] = []
        self.failed = Counter[str]()
        self.url = ""
        self.most_under_way = 0
        self._under_way = 0
        self._to_fail = Fraction()  # exact: of ten steps of 0.1, none is lost to rounding

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self._under_way += 1
        self.most_under_way = max(self.most_under_way, self._under_way)
        try:
            return await self._graded(request)
        finally:
            self._under_way -= 1

    async def _graded(self, request: web.Request) -> web.StreamResponse:
        group = await request.json()
        self.received.append(group)
        rewards = [grade(response["text"], group["answer"]) for response in group["responses"]]
        self._to_fail += Fraction(self.share).limit_denominator(1000)
        if self._to_fail < 1:
            return web.json_response({"rewards": rewards})
        self._to_fail -= 1
        fault = self.faults[self.failed.total() % len(self.faults)]
        self.failed[fault] += 1
        return await FAULTS[fault](request, rewards)

    @contextmanager
    def running(self, port: int = 0) -> Iterator["RewardService"]:
        started, stop = threading.Event(), asyncio.Event()
        loops: list[asyncio.AbstractEventLoop] = []

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            application = web.Application(client_max_size=2**26)
            application.router.add_post("/grade", self._answer)
            runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", port).start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/grade"
            started.set()
            await stop.wait()
            await runner.cleanup()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert started.wait(30)
        try:
            yield self
        finally:
            loops[0].call_soon_threadsafe(stop.set)
            thread.join(30)
