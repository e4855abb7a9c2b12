"""Restarts: when, how often, after which pause; and servers of somebody else, which are only looked at."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving import endpoint_watch, watched_server
from minpro_megatron.serving.endpoints import endpoint_file, read_server_addresses, request_restart
from minpro_megatron.serving.health import Health, Question, ask, overlaps_scheduling
from minpro_megatron.serving.server_process import ServerStartError
from minpro_megatron.serving.turn_files import last_confirmed, write_turn
from minpro_megatron.serving.watched_server import ExternalServer, OwnServer, external_urls
from tests.support.recorded_server import RecordedServer
from tests.support.rollout_fakes import run_config

INCARNATION = 2
SERVER = {
    "start_timeout_s": 100, "health_interval_s": 5, "unhealthy_after_s": 60, "max_restarts": 3, "restart_window_s": 300,
}  # fmt: skip


class Clock:
    now = 1000.0


class Immediate[Answer]:
    """A Question whose answer is there at once; None from the call stands for one that is still awaited."""

    def __init__(self, call: Callable[[], Answer]) -> None:
        self.answer = call()
        self.asked_at = Clock.now

    def is_over(self) -> bool:
        return self.answer is not None


class FakeProcess:
    """A server process without a process."""

    def __init__(self) -> None:
        self.index, self.log_file = 0, Path("server-0.log")
        self.num_starts, self.num_ends = 0, 0
        self.exit_status: int | None = None
        self.is_started = False
        self.ready: bool | None = True
        self.start_error: ServerStartError | None = None

    def start(self) -> None:
        if self.start_error is not None:
            raise self.start_error
        self.num_starts += 1
        self.exit_status, self.is_started = None, True

    @property
    def address(self) -> ServerAddress:
        return ServerAddress(index=0, url="http://s:1", tensor_parallel=1, start=self.num_starts - 1)

    def generates(self) -> bool | None:
        return self.ready

    def describe_end(self) -> str:
        return f"ended with status {self.exit_status}"

    def describe_slow_start(self) -> str:
        return "too slow"

    def log_tail(self) -> str:
        return "the log's end"


class Setting:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **server: object) -> None:
        values = run_config(tmp_path).model_dump()
        values["server"] |= SERVER | server
        placement = values["server"].pop("placement")
        config = RunConfig.model_validate(values)
        in_place = config.server.model_copy(update={"placement": placement})
        self.config = config.model_copy(update={"server": in_place})
        self.config.run_dir.mkdir(parents=True, exist_ok=True)
        self.health: Health | None = Health.ANSWERS
        self.overlaps: bool | None = None
        self.generates: Health | None = Health.ANSWERS
        self.process = FakeProcess()
        Clock.now = 1000.0
        for module in (watched_server, endpoint_watch):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: Clock.now))
        monkeypatch.setattr(watched_server, "Question", Immediate)
        monkeypatch.setattr(watched_server, "ask", lambda *_: self.health)
        monkeypatch.setattr(watched_server, "overlaps_scheduling", lambda *_: self.overlaps)
        monkeypatch.setattr(watched_server, "ask_to_generate", lambda *_: self.generates)
        monkeypatch.setattr(watched_server, "stop_servers", self._stop)

    def _stop(self, servers: list[FakeProcess]) -> None:
        for server in servers:
            server.num_ends += 1
            server.exit_status = -9

    def own(self) -> OwnServer:
        return OwnServer(self.process, self.config, INCARNATION)  # type: ignore[arg-type]

    def external(self) -> ExternalServer:
        return ExternalServer(0, "http://s:1", self.config, INCARNATION)

    def stated(self) -> list[int]:
        """The `start` of the stated address, if there is one."""
        return [address.start for address in read_server_addresses(self.config.run_dir, 1, INCARNATION)]


def pass_time(server: Any, seconds: float, step_s: float = 0.25) -> None:
    for _ in range(round(seconds / step_s)):
        Clock.now += step_s
        server.tick()


def test_a_server_is_stated_once_it_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch)
    setting.process.ready = False
    server = setting.own()
    pass_time(server, 99)
    assert (setting.stated(), server.address_is_stated) == ([], False)
    setting.process.ready = True
    pass_time(server, 0.75)
    assert (setting.stated(), server.address_is_stated, setting.process.num_starts) == ([0], True, 1)


@pytest.mark.parametrize("kind", ["own", "external"])
def test_an_address_that_is_gone_from_the_run_folder_is_stated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    setting = Setting(tmp_path, monkeypatch)
    server = setting.own() if kind == "own" else setting.external()
    pass_time(server, 10)
    assert setting.stated() == [0]
    endpoint_file(setting.config.run_dir, 0, INCARNATION).unlink()
    pass_time(server, 5.25)
    assert (setting.stated(), setting.process.num_ends) == ([0], 0)
    assert "the address of server 0 was missing from the run folder: written again" in caplog.text
    setting.config.run_dir.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        pass_time(server, 10)
    assert not setting.config.run_dir.exists()


@pytest.mark.parametrize("how", ["ends", "is too slow", "is silent", "has no port"])
def test_a_first_start_that_fails_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    setting = Setting(tmp_path, monkeypatch)
    setting.process.ready = None if how == "is silent" else False
    server = setting.own()
    if how == "has no port":
        setting.process.start_error = ServerStartError("port taken")
    else:
        pass_time(server, 50)
    if how == "ends":
        setting.process.exit_status = 1
    expected = {"ends": "ended with status 1", "has no port": "port taken"}.get(how, "too slow")
    with pytest.raises(ServerStartError, match=expected):
        pass_time(server, 60)
    assert setting.process.num_starts <= 1


def test_in_the_trainers_turn_only_servers_that_have_released_their_memory_have_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, monkeypatch, placement="shared")
    folder, process, server = setting.config.run_dir, setting.process, setting.own()

    def turn(number: int, released: list[ServerAddress] | None) -> None:
        write_turn(folder, number, released, INCARNATION)
        server.tick()
        assert last_confirmed(folder, 0, INCARNATION) == number

    pass_time(server, 1)
    first = process.address
    turn(1, [first])
    pass_time(server, 10)
    assert (setting.stated(), process.num_starts, process.num_ends) == ([0], 1, 0)
    process.exit_status = -9  # it ends while the trainer has its memory: started in the servers' turn
    pass_time(server, 100)
    assert (setting.stated(), process.num_starts) == ([], 1)
    turn(2, None)
    pass_time(server, 1)
    assert (setting.stated(), process.num_starts) == ([1], 2)
    turn(3, [first])  # an earlier start has released its memory, and not this one
    assert (setting.stated(), process.exit_status) == ([], -9)
    turn(4, None)
    process.ready = False
    pass_time(server, 10)
    assert process.num_starts == 3
    turn(5, [])  # while it starts, which is no failure
    assert process.exit_status == -9
    pass_time(server, 200)
    process.ready = True
    turn(6, None)
    pass_time(server, 1)
    assert (setting.stated(), process.num_starts) == ([3], 4)
    write_turn(folder, 7, [], INCARNATION, is_last=True)  # the run needs it no more: no failure, and no restart
    pass_time(server, 200)
    assert last_confirmed(folder, 0, INCARNATION) == 7
    assert (setting.stated(), process.exit_status, process.num_starts) == ([], -9, 4)
    assert server.given_up is None


def test_a_turn_that_cannot_be_read_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch, placement="shared")
    server = setting.own()
    pass_time(server, 1)
    write_turn(setting.config.run_dir, 1, [setting.process.address], INCARNATION)
    server.tick()
    (damaged,) = (setting.config.run_dir / "endpoints").glob("turn-start-*.json")
    damaged.write_text('{"number": 2, "relea')
    pass_time(server, 5)
    assert (setting.stated(), last_confirmed(setting.config.run_dir, 0, INCARNATION)) == ([0], 1)


def test_a_server_that_never_releases_its_memory_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch, placement="shared", max_restarts=2)
    server = setting.own()
    pass_time(server, 1)
    for number in range(1, 6, 2):
        assert server.given_up is None
        write_turn(setting.config.run_dir, number, [], INCARNATION)
        server.tick()
        write_turn(setting.config.run_dir, number + 1, None, INCARNATION)
        pass_time(server, 10)
    assert server.given_up is not None
    assert "max_restarts = 2" in server.given_up
    assert "has not released its memory" in server.given_up


def test_a_server_that_ends_is_restarted_after_ever_longer_pauses_and_so_often_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, monkeypatch)
    server = setting.own()
    pass_time(server, 1)
    for restart, pause_s in enumerate([1, 2, 4], start=1):
        setting.process.exit_status = -9
        server.tick()
        assert setting.stated() == []  # withdrawn at once: its groups move
        assert setting.process.num_ends == restart  # with what its process has left behind
        pass_time(server, pause_s - 0.5)
        assert setting.process.num_starts == restart
        pass_time(server, 1.25)
        assert setting.process.num_starts == restart + 1
        assert setting.stated() == [restart]
    setting.process.exit_status = 3
    pass_time(server, 100)
    assert server.given_up == "failed again after server.max_restarts = 3 restarts within 300 s: ended with status 3"
    assert (setting.stated(), setting.process.num_starts) == ([], 4)


def test_a_server_that_was_given_up_comes_back_when_its_restarts_are_long_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, monkeypatch, max_restarts=2)
    server = setting.own()
    pass_time(server, 1)
    ends = []
    for _ in range(3):
        setting.process.exit_status = -9
        ends.append(Clock.now)
        pass_time(server, 50)
    assert (server.given_up is None, setting.process.num_starts) == (False, 3)
    pass_time(server, ends[0] + 299 - Clock.now)
    assert setting.process.num_starts == 3
    pass_time(server, 3)
    assert (server.given_up, setting.process.num_starts, setting.stated()) == (None, 4, [3])
    setting.process.exit_status = -9  # the second of the former restarts is 250 s ago, the third now
    pass_time(server, 10)
    assert (server.given_up is None, setting.process.num_starts) == (False, 4)
    pass_time(server, ends[1] + 302 - Clock.now)
    assert setting.process.num_starts == 5


def test_failures_far_apart_never_use_up_the_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch, max_restarts=1)
    server = setting.own()
    pass_time(server, 1)
    for restart in range(1, 8):
        setting.process.exit_status = -9
        pass_time(server, 310, step_s=0.5)
        assert (server.given_up, setting.stated()) == (None, [restart])


def test_without_restarts_the_first_failure_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch, max_restarts=0)
    server = setting.own()
    pass_time(server, 1)
    setting.process.exit_status = -9
    pass_time(server, 1000, step_s=5)
    assert (server.given_up is None, setting.process.num_starts) == (False, 1)


def test_a_restart_that_the_collector_asks_for_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch)
    server = setting.own()
    pass_time(server, 1)
    for incarnation, start in ((INCARNATION - 1, 0), (INCARNATION, 1)):  # of an earlier run; of a start still to come
        address = ServerAddress(index=0, url="http://s:1", tensor_parallel=1, start=start)
        request_restart(setting.config.run_dir, address, incarnation, "late")
        if start == 0:
            pass_time(server, 6)
    pass_time(server, 6)
    assert (setting.process.num_ends, setting.stated()) == (0, [0])
    request_restart(setting.config.run_dir, setting.process.address, INCARNATION, "late with an answer")
    pass_time(server, 5)
    assert setting.process.num_ends == 1
    pass_time(server, 20)
    assert (setting.process.num_ends, setting.stated()) == (1, [1])


def test_a_server_of_somebody_else_that_hangs_is_stated_again_once_it_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, monkeypatch)
    server = setting.external()
    pass_time(server, 6)
    assert setting.stated() == [0]
    address = ServerAddress(index=0, url="http://s:1", tensor_parallel=1, start=0)
    request_restart(setting.config.run_dir, address, INCARNATION, "late with an answer")
    setting.generates = Health.SILENT  # while /model_info answers as ever
    pass_time(server, 60)
    assert setting.stated() == []
    setting.generates = Health.ANSWERS
    pass_time(server, 6)
    assert setting.stated() == [1]
    setting.generates = Health.SILENT  # nobody says that it hangs now
    pass_time(server, 100)
    assert setting.stated() == [1]


def test_a_restart_that_fails_counts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch, max_restarts=2)
    server = setting.own()
    pass_time(server, 1)
    setting.process.exit_status = 1
    setting.process.ready = False
    pass_time(server, 3)
    assert setting.process.num_starts == 2
    setting.process.start_error = ServerStartError("port taken")
    pass_time(server, 200)
    assert server.given_up == "failed again after server.max_restarts = 2 restarts within 300 s: port taken"


def test_a_silent_server_is_ended_and_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch)
    server = setting.own()
    pass_time(server, 10)
    setting.health = Health.SILENT
    pass_time(server, 54)
    assert setting.stated() == [0]
    setting.health = Health.ANSWERS
    pass_time(server, 10)
    setting.health = Health.SILENT
    pass_time(server, 54)
    assert setting.stated() == [0]  # the answer in between counted
    pass_time(server, 12)
    assert setting.process.num_ends == 1
    assert setting.stated() == [1]


def test_an_answer_that_never_ends_is_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch)
    server = setting.own()
    pass_time(server, 10)
    setting.health = None
    pass_time(server, 70)
    assert setting.process.num_ends == 1


def test_a_long_pause_of_this_process_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch)
    server = setting.own()
    pass_time(server, 10)
    Clock.now += 3600  # stopped, or the machine slept
    pass_time(server, 10)
    assert (setting.process.num_ends, setting.stated()) == (0, [0])


def test_a_server_of_somebody_else_is_stated_while_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tmp_path, monkeypatch)
    setting.health = Health.GONE
    server = setting.external()
    pass_time(server, 20)
    assert setting.stated() == []
    setting.health = Health.ANSWERS
    pass_time(server, 6)
    assert setting.stated() == [0]
    setting.health = Health.GONE  # nobody listens: its process has ended
    pass_time(server, 6)
    assert (setting.stated(), server.address_is_stated) == ([], False)
    setting.health = Health.ANSWERS
    pass_time(server, 6)
    assert setting.stated() == [1]  # what it holds now, nobody knows
    setting.health = Health.SILENT
    pass_time(server, 50)
    assert setting.stated() == [1]
    pass_time(server, 20)
    assert setting.stated() == []
    setting.health = Health.FORBIDDEN
    with pytest.raises(ServerStartError, match=r"server 0 at http://s:1 refuses the API key"):
        pass_time(server, 6)


def test_a_server_of_somebody_else_that_would_name_wrong_versions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(tmp_path, monkeypatch)
    overrides = ["staleness.mode=bounded", "publish.pause_mode=in_place"]
    setting.config = with_overrides(setting.config, overrides)
    waiting = setting.external()
    pass_time(waiting, 20)
    assert setting.stated() == []  # it has not said how it schedules
    setting.overlaps = False
    pass_time(setting.external(), 12)
    assert setting.stated() == [0]
    setting.overlaps = True
    with pytest.raises(ServerStartError, match=r"server 0 at http://s:1 .* start it with --disable-overlap-schedule"):
        pass_time(setting.external(), 6)


@pytest.mark.parametrize(
    ("answer", "overlaps"),
    [
        ({"disable_overlap_schedule": True}, False),
        ({"disable_overlap_schedule": False}, True),
        ({}, None),
        ([], None),
        ("no JSON", None),
    ],
)
def test_what_a_server_says_of_its_scheduling(answer: object, overlaps: bool | None) -> None:
    server = RecordedServer(hang_s=0.3)
    server.answers["server_info"] = (200, answer)
    assert overlaps_scheduling(server.url, {}, 5) is overlaps
    server.close()
    assert overlaps_scheduling(server.url, {}, 5) is None


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("10.0.0.7:30000", "must be like"),
        ("ftp://a:1", "must be like"),
        ("http://a:1/v1", "must be like"),
        ("http://", "must be like"),
        ("http://me:secret@a:1", "must not hold a password"),
        ("http://b:2", "each server may be named once only"),
    ],
)
def test_addresses_that_cannot_be_servers_are_refused(url: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        external_urls(ServerConfig(urls=["http://b:2/", url]))
    assert "secret" not in str(caught.value)
    assert external_urls(ServerConfig(urls=["http://b:2/", "https://c"])) == ["http://b:2", "https://c"]


def test_nobody_listening_is_distinguished_from_silence() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert ask(url, {}, 0.05) is Health.SILENT
    assert ask(url, {}, 0.05) is Health.GONE


def test_a_fault_in_a_question_is_not_lost() -> None:
    def broken() -> None:
        raise KeyError("x")

    question = Question(broken)
    question.join()
    with pytest.raises(KeyError):
        question.is_over()
