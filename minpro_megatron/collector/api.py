"""The collector's HTTP interface, which the trainer's rank 0 uses through `minpro_megatron.feed.feed`.

    POST /v1/start/{version}             the trainer has the weights of this version
    GET  /v1/batch/{index}               Batch, or LEASE_FIRST, or NOT_READY
    POST /v1/scored                      BehaviorLogProbs
    POST /v1/consumed                    TrainedStep
    POST /v1/release_begin/{version}     PublishLease, or LEASE_FIRST, or NOT_READY
    POST /v1/released/{version}          {"servers": [indices]}
    POST /v1/publish_begin/{version}     PublishLease, or LEASE_FIRST, or NOT_READY
    POST /v1/publish_end/{version}       {"held_by": [server indices], "late": [server indices]}
    POST /v1/checkpoint_begin/{version}
    POST /v1/checkpoint_end/{version}
    POST /v1/finish                      CollectorTotals, or LEASE_FIRST, or NOT_READY

feed/protocol.py names the statuses. Records travel as MessagePack; the body of an error is one line of text.
"""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path

import msgspec
from aiohttp import web

from minpro_megatron import records
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.scores import WrongScores
from minpro_megatron.collector.changes import CollectorFailed
from minpro_megatron.collector.collector import Collector
from minpro_megatron.collector.leases import Conflict
from minpro_megatron.collector.strangers import UnauthenticatedConnections
from minpro_megatron.errors import RunBlocked, UserError
from minpro_megatron.feed.protocol import (
    COLLECTOR_ENDPOINT,
    COLLECTOR_FAILED,
    COLLECTOR_TOKEN,
    DAMAGED_REQUEST,
    INCARNATION_HEADER,
    LEASE_FIRST,
    LONG_POLL_S,
    NOT_READY,
    OUT_OF_ORDER,
    TOKEN_HEADER,
    WITHOUT_TOKEN,
    CollectorEndpoint,
    write_token,
)
from minpro_megatron.files.replacement import replace_file_in
from minpro_megatron.records import BehaviorLogProbs, CollectorTotals, PublishLease, Record, TrainedStep
from minpro_megatron.serving.addresses import url_here

log = logging.getLogger(__name__)

# The scores of a large batch: 4096 responses of 20480 tokens are 0.3 GiB.
MAX_BODY_BYTES = 8 * 2**30

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Published(msgspec.Struct):
    held_by: list[int]
    late: list[int] = []


class _Released(msgspec.Struct):
    servers: list[int]


class CollectorApi:
    """Serves a collector, once there is one, to trainers of one incarnation; use inside `async with`.

    It listens before the collector exists, so that a trainer that starts earlier waits for it and receives its
    failures.
    """

    def __init__(self, run_dir: Path, host: str, port: int, incarnation: int, long_poll_s: float = LONG_POLL_S) -> None:
        self._run_dir = Path(run_dir)
        self._host, self._port = host, port
        self._incarnation = incarnation
        self._long_poll_s = long_poll_s
        self._token = b""
        self._endpoint = ""
        self._collector: asyncio.Future[Collector] | None = None
        self._runner: web.AppRunner | None = None
        self._strangers: UnauthenticatedConnections | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._failure_told = asyncio.Event()

    async def __aenter__(self) -> "CollectorApi":
        """Raises OSError if the port is taken."""
        self._collector = asyncio.get_running_loop().create_future()
        self._token = write_token(self._run_dir).encode()
        application = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY_BYTES)
        application.router.add_post(r"/v1/start/{version:\d{1,9}}", self._start)
        application.router.add_get(r"/v1/batch/{index:\d{1,9}}", self._batch)
        application.router.add_post("/v1/scored", self._scored)
        application.router.add_post("/v1/consumed", self._consumed)
        application.router.add_post(r"/v1/release_begin/{version:\d{1,9}}", self._release_begin)
        application.router.add_post(r"/v1/released/{version:\d{1,9}}", self._released)
        application.router.add_post(r"/v1/publish_begin/{version:\d{1,9}}", self._publish_begin)
        application.router.add_post(r"/v1/publish_end/{version:\d{1,9}}", self._publish_end)
        application.router.add_post(r"/v1/checkpoint_begin/{version:\d{1,9}}", self._checkpoint_begin)
        application.router.add_post(r"/v1/checkpoint_end/{version:\d{1,9}}", self._checkpoint_end)
        application.router.add_post("/v1/finish", self._finish)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=1.0)
        await self._runner.setup()
        assert self._runner.server is not None
        self._strangers = UnauthenticatedConnections(self._runner.server)
        self._sweeping = asyncio.create_task(self._strangers.sweep())
        await web.TCPSite(self._runner, self._host, self._port).start()
        host, port = self._runner.addresses[0][:2]
        endpoint = CollectorEndpoint(url=url_here(host, port), incarnation=self._incarnation)
        self._endpoint = msgspec.json.encode(endpoint).decode() + "\n"
        replace_file_in(self._run_dir, COLLECTOR_ENDPOINT, self._endpoint)
        return self

    async def __aexit__(self, *_: object) -> None:
        # only the files of this collector: by now the files may be those of a newer start
        for file, written in ((COLLECTOR_ENDPOINT, self._endpoint), (COLLECTOR_TOKEN, self._token.decode())):
            with suppress(OSError):
                if (self._run_dir / file).read_text(encoding="utf-8") == written:
                    (self._run_dir / file).unlink()
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    def serve(self, collector: Collector) -> None:
        """Starts answering requests from `collector`."""
        assert self._collector is not None
        self._collector.set_result(collector)

    def fail(self, message: str) -> None:
        """Reports to all waiting requests that there will be no collector."""
        assert self._collector is not None
        if not self._collector.done():
            self._collector.set_exception(CollectorFailed(message))
            self._collector.exception()  # retrieved, so that asyncio does not warn if no trainer waits

    async def wait_until_failure_is_reported(self, timeout_s: float) -> None:
        """Returns once a request was answered with the collector's failure, or after `timeout_s` seconds.

        Otherwise a trainer between two requests would find no collector, and not the reason.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self._failure_told.wait(), timeout_s)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get(INCARNATION_HEADER)
        if given != str(self._incarnation):
            message = f"this is incarnation {self._incarnation} of the run, the request is of {given}"
            return _refusal(OUT_OF_ORDER, message)
        token = request.headers.get(TOKEN_HEADER, "").encode(errors="surrogateescape")  # as aiohttp decodes
        if not hmac.compare_digest(token, self._token):
            return _refusal(WITHOUT_TOKEN, f"{TOKEN_HEADER} is not the token in {COLLECTOR_TOKEN} of this run's folder")
        assert self._strangers is not None
        self._strangers.has_token(request.protocol)
        try:
            return await handler(request)
        except (UserError, WrongScores, msgspec.DecodeError) as error:
            return _refusal(DAMAGED_REQUEST, str(error))
        except Conflict as error:
            return _refusal(OUT_OF_ORDER, str(error))
        except CollectorFailed as error:
            self._failure_told.set()
            return _refusal(COLLECTOR_FAILED, str(error))
        except (JournalError, RunBlocked) as error:
            return _refusal(COLLECTOR_FAILED, str(error))

    async def _start(self, request: web.Request) -> web.Response:
        collector = await self._ready()
        if collector is None:
            return web.Response(status=NOT_READY)
        collector.start(int(request.match_info["version"]))
        return web.Response()

    async def _batch(self, request: web.Request) -> web.Response:
        collector = await self._must_be_ready()
        return await _answer(await collector.batch(int(request.match_info["index"]), self._long_poll_s))

    async def _scored(self, request: web.Request) -> web.Response:
        body = await request.read()
        scores = await asyncio.to_thread(records.decode, BehaviorLogProbs, body)
        await (await self._must_be_ready()).scored(scores)
        return web.Response()

    async def _consumed(self, request: web.Request) -> web.Response:
        trained = await asyncio.to_thread(records.decode, TrainedStep, await request.read())
        await (await self._must_be_ready()).consumed(trained)
        return web.Response()

    async def _release_begin(self, request: web.Request) -> web.Response:
        collector, version = await self._must_be_ready(), int(request.match_info["version"])
        lease = await collector.release_begin(version, self._long_poll_s)
        return await _answer(lease, wanted=lease is not None and lease.releases)

    async def _released(self, request: web.Request) -> web.Response:
        released = msgspec.json.decode(await request.read(), type=_Released)
        await (await self._must_be_ready()).released(int(request.match_info["version"]), released.servers)
        return web.Response()

    async def _publish_begin(self, request: web.Request) -> web.Response:
        collector, version = await self._must_be_ready(), int(request.match_info["version"])
        lease = await collector.publish_begin(version, self._long_poll_s)
        return await _answer(lease, wanted=lease is not None and lease.version == version)

    async def _publish_end(self, request: web.Request) -> web.Response:
        published = msgspec.json.decode(await request.read(), type=_Published)
        collector = await self._must_be_ready()
        await collector.publish_end(int(request.match_info["version"]), published.held_by, published.late)
        return web.Response()

    async def _checkpoint_begin(self, request: web.Request) -> web.Response:
        await (await self._must_be_ready()).checkpoint_begin(int(request.match_info["version"]))
        return web.Response()

    async def _checkpoint_end(self, request: web.Request) -> web.Response:
        await (await self._must_be_ready()).checkpoint_end(int(request.match_info["version"]))
        return web.Response()

    async def _finish(self, request: web.Request) -> web.StreamResponse:
        collector = await self._must_be_ready()
        totals = await collector.finish(self._long_poll_s)
        if not isinstance(totals, CollectorTotals):
            return await _answer(totals)
        response = await _answer(totals)
        await response.prepare(request)
        await response.write_eof()
        await collector.totals_delivered()
        return response

    async def _ready(self) -> Collector | None:
        assert self._collector is not None
        done, _ = await asyncio.wait([self._collector], timeout=self._long_poll_s)
        return self._collector.result() if done else None

    async def _must_be_ready(self) -> Collector:
        collector = await self._ready()
        if collector is None:
            raise Conflict("the collector is still starting; send `start` first")
        return collector


async def _answer(record: Record | None, wanted: bool | None = None) -> web.Response:
    """The record. With status LEASE_FIRST if it is not the kind that was `wanted` but a lease to be fulfilled first."""
    if record is None:
        return web.Response(status=NOT_READY)
    if wanted is None:
        wanted = not isinstance(record, PublishLease)
    # In a thread: a large batch takes seconds to encode, and other requests should not wait for it.
    body = await asyncio.to_thread(records.encode, record)
    return web.Response(body=body, status=HTTPStatus.OK if wanted else LEASE_FIRST, content_type="application/msgpack")


def _refusal(status: HTTPStatus, message: str) -> web.Response:
    return web.Response(status=status, text=" ".join(message.split()))
