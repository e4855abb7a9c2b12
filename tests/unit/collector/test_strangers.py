"""Connections to the collector without the run's token: closed in time, and few at a time."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from minpro_megatron.collector import strangers
from minpro_megatron.collector.api import CollectorApi
from minpro_megatron.feed.protocol import INCARNATION_HEADER, TOKEN_HEADER, read_token
from minpro_megatron.monitor import repeated_lines
from minpro_megatron.monitor.repeated_lines import RepeatedLines
from tests.support.running_fleet import run

INCARNATION = 4


class Collector:
    """The port of a collector that is still starting: a trainer's `start` waits for it."""

    def __init__(self, run_dir: Path, port: int) -> None:
        self.port = port
        self._writers: list[asyncio.StreamWriter] = []
        self._headers = {INCARNATION_HEADER: str(INCARNATION), TOKEN_HEADER: read_token(run_dir)}

    async def connect(self, first_bytes: bytes = b"") -> asyncio.StreamReader:
        """A connection that sends no more than these bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(first_bytes)
        self._writers.append(writer)  # one that is forgotten closes its connection
        return reader

    async def start(self) -> int:
        """What the trainer is answered."""
        async with aiohttp.ClientSession() as session:
            url = f"http://127.0.0.1:{self.port}/v1/start/0"
            async with session.post(url, headers=self._headers) as response:
                return response.status


@asynccontextmanager
async def collector(run_dir: Path, long_poll_s: float = 0.3) -> AsyncIterator[Collector]:
    run_dir.mkdir(parents=True, exist_ok=True)
    async with CollectorApi(run_dir, "127.0.0.1", 0, INCARNATION, long_poll_s) as api:
        assert api._runner is not None
        yield Collector(run_dir, api._runner.addresses[0][1])


async def closed(connection: asyncio.StreamReader, limit_s: float) -> bool:
    try:
        async with asyncio.timeout(limit_s):
            await connection.read()  # to the end
            return True
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.fixture(autouse=True)
def _short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "SWEEP_INTERVAL_S", 0.01)


def test_a_connection_without_a_token_is_closed_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "TOKEN_TIMEOUT_S", 0.05)

    async def test() -> None:
        async with collector(tmp_path) as it:
            silent, dripping = await it.connect(), await it.connect(b"POST /v1/start/0 HTTP/1.1\r\nHost: x\r\n")
            wrong = await it.connect(
                f"GET /v1/batch/0 HTTP/1.1\r\nHost: x\r\n{INCARNATION_HEADER}: {INCARNATION}\r\n"
                f"{TOKEN_HEADER}: guessed\r\n\r\n".encode()
            )
            assert (await wrong.readline()).split()[1] == b"403"
            answer = asyncio.create_task(it.start())  # takes longer than the limit
            assert await closed(silent, 5)
            assert await closed(dripping, 5)
            assert await closed(wrong, 5)
            assert await answer == 204

    run(test())


def test_of_too_many_connections_the_oldest_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "MAX_PER_PEER", 3)

    async def test() -> None:
        async with collector(tmp_path, long_poll_s=0.01) as it:
            idle = []
            for _ in range(5):
                idle.append(await it.connect())
                await asyncio.sleep(0.03)  # a sweep: which of them is older
            found = await asyncio.gather(*(closed(one, 0.2) for one in idle))
            assert found == [True, True, False, False, False]
            assert await it.start() == 204  # the trainer is let in all the same

    run(test())


def test_what_is_logged_again_and_again_is_logged_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = 100.0, []
    monkeypatch.setattr(repeated_lines.time, "monotonic", lambda: now)
    log = logging.Logger("test")
    log.addFilter(RepeatedLines())

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log.addHandler(Kept())
    for number in range(1000):
        log.error("out of files\nsocket: %d", number)
    log.error("another fault: %s", "x")
    now += 61
    log.error("out of files\nsocket: %d", 7)
    assert lines == [
        "out of files\nsocket: 0",
        "another fault: x",
        "(999 more of these since the last one) out of files\nsocket: 7",
    ]
