"""A small server that speaks the part of SGLang's HTTP that the fleet uses; every answer is right."""

import asyncio
from typing import Any, Self

from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.support.sglang_answers import answers


class FakeEngine:
    """Use inside `async with`. Answers wait for `gate`, to have requests under way; `version` is what it holds.

    One that `hangs` answers /model_info as ever and generates nothing, as SGLang does whose scheduler stands still.
    """

    def __init__(self, version: str = "0", seconds_a_group: float = 0.0) -> None:
        self.version = version
        self.seconds_a_group = seconds_a_group
        self.gate = asyncio.Event()
        self.gate.set()
        self.hangs = False
        self.num_requests = 0
        self.live: set[str] = set()
        self.aborted: list[str] = []
        application = web.Application()
        application.router.add_get("/model_info", self._model_info)
        application.router.add_get("/health_generate", self._health_generate)
        application.router.add_post("/generate", self._generate)
        application.router.add_post("/abort_request", self._abort)
        self._server = TestServer(application)

    async def __aenter__(self) -> Self:
        await self._server.start_server()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.gate.set()
        await self._server.close()

    @property
    def url(self) -> str:
        return str(self._server.make_url("")).rstrip("/")

    async def end(self) -> None:
        """Ends as a killed process does: connections break, nobody listens any more."""
        for connection in list(self._server.handler.connections):  # type: ignore[union-attr]
            if connection.transport is not None:
                connection.transport.abort()
        await self._server.close()

    async def _model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version, "model_path": "m"})

    async def _health_generate(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self.hangs else 200)

    async def _generate(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        self.num_requests += 1
        self.live |= set(body["rid"])
        try:
            await self.gate.wait()
            await asyncio.sleep(self.seconds_a_group)
        finally:
            self.live -= set(body["rid"])
        made = answers(body)
        for one, prompt in zip(made, body["input_ids"], strict=True):
            one["meta_info"]["prompt_tokens"] = len(prompt)
            one["meta_info"]["weight_versions"][0]["version"] = self.version
        return web.json_response(made)

    async def _abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()
