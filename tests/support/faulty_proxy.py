"""A proxy in front of a server, real or not, that does to answers what a network or a dying server would."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.test_utils import TestServer

Answers = list[dict[str, Any]]
Fault = Callable[[web.Request, bytes], Awaitable[web.StreamResponse]]


class FaultyProxy:
    """Use inside `async with`; hands everything on to `upstream`.

    `fault` happens to the next `times` answers of /generate; `is_silent` leaves everything unanswered.
    """

    def __init__(self, upstream: str) -> None:
        self.fault: Fault | None = None
        self.times = 0
        self.num_faults = 0
        self.is_silent = False
        self._upstream = upstream
        self._over = asyncio.Event()
        self._server = self._made_server(port=None)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "FaultyProxy":
        self._session = aiohttp.ClientSession()
        await self._server.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await self._server.close()
        assert self._session is not None
        await self._session.close()

    def _made_server(self, port: int | None) -> TestServer:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._handle)
        return TestServer(application, port=port)

    async def refuse(self) -> None:
        """From now on connections are refused, until `listen_again`."""
        port = self._server.port
        await self._server.close()
        self._server = self._made_server(port)

    async def listen_again(self) -> None:
        await self._server.start_server()

    @property
    def url(self) -> str:
        return str(self._server.make_url("")).rstrip("/")

    def fail(self, fault: Fault, times: int) -> None:
        self.fault, self.times = fault, times

    async def hang(self, request: web.Request, body: bytes) -> web.StreamResponse:
        await self._over.wait()
        return web.Response()

    async def drip(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """A byte every few milliseconds."""
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        for place in range(len(body)):
            if self._over.is_set():
                break
            await response.write(body[place : place + 1])
            await asyncio.sleep(0.005)
        return response

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        if self.is_silent:
            return await self.hang(request, b"")
        sent = await request.read()
        headers = {name: request.headers[name] for name in ("Content-Type", "Authorization") if name in request.headers}
        async with self._session.request(
            request.method, f"{self._upstream}{request.path}", data=sent, headers=headers
        ) as answer:
            body = await answer.read()
        if self.fault is not None and self.times > 0 and request.path == "/generate":
            self.times -= 1
            self.num_faults += 1
            return await self.fault(request, body)
        return web.Response(body=body, status=answer.status, content_type=answer.content_type)


async def dropped(request: web.Request, body: bytes) -> web.StreamResponse:
    """The connection ends in the middle of the answer."""
    response = web.StreamResponse(headers={"Content-Length": str(len(body))})
    await response.prepare(request)
    await response.write(body[: len(body) // 2])
    assert request.transport is not None
    request.transport.abort()
    return response


async def internal_error(request: web.Request, body: bytes) -> web.StreamResponse:
    return web.Response(status=500, text="scheduler is busy")


async def truncated(request: web.Request, body: bytes) -> web.StreamResponse:
    """A whole HTTP answer with half of the JSON in it."""
    return web.Response(body=body[: len(body) // 2], content_type="application/json")


def changed(change: Callable[[Answers], None]) -> Fault:
    async def fault(request: web.Request, body: bytes) -> web.StreamResponse:
        answers = json.loads(body)
        change(answers)
        return web.Response(text=json.dumps(answers), content_type="application/json")

    return fault


def nan_log_prob(answers: Answers) -> None:
    answers[-1]["meta_info"]["output_token_logprobs"][0][0] = float("nan")


def one_token_short(answers: Answers) -> None:
    answers[-1]["output_ids"].pop()


def stale_version(answers: Answers) -> None:
    for span in answers[0]["meta_info"]["weight_versions"]:
        span["version"] = str(int(span["version"]) - 1)


def exchanged(answers: Answers) -> None:
    """Each response is given as the answer to another's request."""
    answers.reverse()
