"""The role `serve` without a server: what ends it at once, and what it says then."""

import asyncio
import signal
from pathlib import Path

import pytest

from minpro_megatron.roles import serve
from minpro_megatron.serving.endpoints import read_server_addresses
from minpro_megatron.serving.server_process import ServerStartError
from tests.support.fake_engine import FakeEngine
from tests.support.running_fleet import run, until
from tests.support.serve_settings import config


@pytest.fixture(autouse=True)
def _no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(serve, "WATCH_INTERVAL_S", 0.005)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (
            {"api_key_variable": "THE_KEY"},
            "serve: server.api_key_variable = 'THE_KEY': this environment variable is not",
        ),
        (
            {"urls": ["a:1"], "api_key_variable": "THE_KEY"},
            "serve: server.urls: 'a:1' must be like http://10.0.0.7:30000",
        ),
        ({"urls": ["http://a"], "api_key_variable": "THE_KEY"}, "serve: server.api_key_variable = 'THE_KEY'"),
    ],
)
def test_wrong_settings_end_it_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: dict, message: str
) -> None:
    monkeypatch.delenv("THE_KEY", raising=False)
    assert serve.run(config(tmp_path, **server), 0) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("serve: ")] == lines[:1]
    assert lines[0].startswith(message)


def test_without_any_of_the_given_servers_it_gives_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(tmp_path, urls=["http://127.0.0.1:9"], start_timeout_s=0.05, health_interval_s=0.01)
    assert serve.run(settings, 0) == 1
    assert (
        "serve: none of server.urls = ['http://127.0.0.1:9'] has answered for server.start_timeout_s = 0.05 s"
        in capsys.readouterr().err
    )


class StubServer:
    def __init__(self, given_up: str | None = None) -> None:
        self.given_up = given_up
        self.address_is_stated = given_up is None

    def tick(self) -> None: ...


@pytest.mark.parametrize(
    ("count", "given_up", "phase"),
    [
        (2, ["failed again", None], "serving without 1 of 2 servers"),
        (4, ["failed again", "failed again"], "serving without 2 of 2 servers"),  # two more are on another node
        (2, [None, None], "serving"),
    ],
)
def test_the_run_goes_on_without_a_server_that_was_given_up(
    tmp_path: Path, count: int, given_up: list[str | None], phase: str
) -> None:
    settings = config(tmp_path, count=count)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    looks = iter([False] * 3 + [True])
    serve._watch(settings, "serve", [StubServer(why) for why in given_up], lambda: next(looks))  # type: ignore[arg-type]
    assert f'"phase": "{phase}"' in next((settings.run_dir / "status").glob("serve*")).read_text()


def test_it_ends_once_the_run_has_no_server_left(tmp_path: Path) -> None:
    settings = config(tmp_path, count=2)
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    with pytest.raises(ServerStartError, match="the first of them"):
        serve._watch(settings, "serve", [StubServer("the first of them"), StubServer("x")], lambda: False)  # type: ignore[arg-type]


class Loading:
    """A server that loads for a while; a look at it takes 20 s."""

    def __init__(self, clock: list[float], ready_s: float) -> None:
        self._clock, self._ready_s = clock, ready_s
        self.address_is_stated = False
        self.given_up = None

    def tick(self) -> None:
        self._clock[0] += 20
        self.address_is_stated = self._clock[0] >= self._ready_s


def test_while_servers_load_there_is_a_line_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]
    monkeypatch.setattr(serve.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(serve.time, "sleep", lambda _: None)
    caplog.set_level("INFO")
    shown: list[str] = []
    monkeypatch.setattr(serve, "write_status", lambda run_dir, role, phase: shown.append(phase))
    settings = config(tmp_path, start_timeout_s=300)
    serve._watch(settings, "serve", [Loading(clock, 150)], lambda: clock[0] >= 400)  # type: ignore[arg-type]
    assert shown == [
        "starting 1 of 1 server",
        "starting 1 of 1 server, 1 min so far (server.start_timeout_s = 300 s)",
        "starting 1 of 1 server, 2 min so far (server.start_timeout_s = 300 s)",
        "serving",
    ]
    assert [record.getMessage() for record in caplog.records] == shown


def test_given_servers_are_stated_and_their_end_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with FakeEngine() as engine:
            settings = config(tmp_path, urls=[f"{engine.url}/"], health_interval_s=0.01, start_timeout_s=0.5)
            role = asyncio.create_task(asyncio.to_thread(serve.run, settings, 4))
            stated = lambda: read_server_addresses(settings.run_dir, 1, 4)  # noqa: E731
            await until(lambda: bool(stated()))
            assert [(address.index, address.url) for address in stated()] == [(0, engine.url)]
            await engine.end()
            await until(lambda: not stated())
            assert await role == 1

    run(test())
