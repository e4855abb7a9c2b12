"""A server releases its memory once it has proved to be idle; in the form that SGLang asks for."""

from collections.abc import Iterator

import pytest

from minpro_megatron.records import ServerAddress
from minpro_megatron.serving import handover
from minpro_megatron.serving.control import NoAnswerInTime, ServerControl
from minpro_megatron.serving.handover import release_memory, start_releasing
from tests.support.recorded_server import RecordedServer

BUSY = (400, "Flush cache failed.\n")


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedServer]]:
    monkeypatch.setattr(handover, "DRAIN_POLL_S", 0.001)
    made = [RecordedServer(), RecordedServer()]
    yield made
    for server in made:
        server.close()


def control(server: RecordedServer, index: int = 0, timeout_s: float = 30) -> ServerControl:
    return ServerControl(ServerAddress(index=index, url=server.url, tensor_parallel=1), timeout_s=timeout_s)


def test_a_busy_server_is_asked_until_it_is_idle(servers: list[RecordedServer]) -> None:
    server = servers[0]
    server.answers["release_memory_occupation"] = (200, "null")
    server.once["flush_cache"] = [BUSY, BUSY]
    release_memory(control(server))
    assert server.received == [
        ("pause_generation", {"mode": "abort"}),
        *[("flush_cache", {})] * 3,
        ("release_memory_occupation", {"tags": ["kv_cache", "weights"]}),
    ]


def test_a_server_that_does_not_become_idle_releases_nothing(servers: list[RecordedServer]) -> None:
    busy, idle = servers
    busy.answers["flush_cache"] = BUSY
    calls = start_releasing([control(busy, 0), control(idle, 1)], drain_s=0.05)
    assert calls.results() == {1: None}
    assert "Flush cache failed" in calls.failures()[0]
    assert calls.late() == []
    assert "release_memory_occupation" not in busy.paths
    assert "release_memory_occupation" in idle.paths


@pytest.mark.parametrize("hung", ["pause_generation", "flush_cache", "release_memory_occupation"])
def test_a_server_that_hangs_is_not_waited_for(servers: list[RecordedServer], hung: str) -> None:
    server = servers[0]
    server.hung.add(hung)
    with pytest.raises(NoAnswerInTime, match=f"{hung}: no answer within 0.2 s"):
        release_memory(control(server, timeout_s=0.2))
    assert server.paths[-1] == hung
    assert server.paths.count(hung) == 1
