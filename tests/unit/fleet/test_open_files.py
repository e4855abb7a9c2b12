"""Enough open files for all connections; without them work waits, and no server is blamed."""

import asyncio
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minpro_megatron.config.run import RunConfig
from minpro_megatron.fleet import generation as generation_module
from minpro_megatron.fleet import open_files
from minpro_megatron.fleet.open_files import (
    files_needed,
    limit_problem,
    max_groups_under_way,
    raise_file_limit,
)
from minpro_megatron.launch.preflight import run_checks as preflight
from tests.support.fake_engine import FakeEngine
from tests.support.rollout_fakes import run_config
from tests.support.running_fleet import run, running, until


def config(count: int = 32, **evaluation: object) -> RunConfig:
    values = run_config(Path("unused")).model_dump()
    values["server"] |= {"count": count, "max_running_requests": 256}
    values["batch"]["responses_per_prompt"] = 8
    values["evaluation"] |= {"samples_per_prompt": 8} | evaluation
    return RunConfig.model_validate(values)


class Limits:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> None:
        self.now = (soft, hard)
        monkeypatch.setattr(resource, "getrlimit", lambda _: self.now)
        monkeypatch.setattr(resource, "setrlimit", lambda _, limits: setattr(self, "now", limits))


def test_every_group_under_way_is_a_connection() -> None:
    """320 requests a server: 40 groups of 8, or 160 of an evaluation with 10 samples, the last two of which are one."""
    others = open_files.BASE_FILES + open_files.FILES_PER_REWARD_WORKER
    for samples, groups in ((8, 40), (16, 40), (10, 160), (3, 106)):
        of_server = groups + open_files.OTHER_CONNECTIONS_PER_SERVER
        assert files_needed(config(samples_per_prompt=samples)) == others + 32 * of_server


def with_environment(made: RunConfig, name: str) -> RunConfig:
    values = made.model_dump()
    values["environment"]["name"] = name
    values["sampling"]["max_turns"] = 3
    values["data"]["chat_template"] = True
    return RunConfig.model_validate(values)


def test_every_turn_of_an_episode_is_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the 320 requests a server: those that gave their places away for a tool may all continue."""
    others = open_files.BASE_FILES + open_files.FILES_PER_REWARD_WORKER
    of_server = 2 * 320 + open_files.OTHER_CONNECTIONS_PER_SERVER
    own = with_environment(config(), "package.module:Class")
    assert files_needed(own) == others + 32 * of_server
    tool = with_environment(config(), "python_tool")
    assert files_needed(tool) == files_needed(own) + 16 * open_files.FILES_PER_TOOL_CALL
    Limits(monkeypatch, 4096, 4096)
    plain, of_episodes = max_groups_under_way(config()), max_groups_under_way(own)
    assert plain is None
    other_files = others + 32 * open_files.OTHER_CONNECTIONS_PER_SERVER
    assert of_episodes == (4096 - other_files) // (2 * 8)


def test_the_soft_limit_is_raised_as_far_as_needed_and_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, hard, expected in ((1024, 2**20, 65536), (1024, 4096, 4096), (100_000, 2**20, 100_000)):
        limits = Limits(monkeypatch, soft, hard)
        raise_file_limit(config())
        assert limits.now == (expected, hard)


def test_a_hard_limit_that_is_too_low_is_reported_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = files_needed(config())
    Limits(monkeypatch, 1024, needed)
    assert limit_problem(config()) is None
    assert list(preflight._open_files(config())) == []
    Limits(monkeypatch, 1024, 1024)
    (problem,) = preflight._open_files(config())
    assert problem.startswith(
        f"the hard limit on open files (ulimit -Hn) = 1024 must be at least {needed} for 32 servers with up to 320 "
        "requests each: raise it"
    )


def test_with_few_files_fewer_groups_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    Limits(monkeypatch, files_needed(config()), 2**20)
    assert max_groups_under_way(config()) is None
    Limits(monkeypatch, 1024, 1024)
    found = max_groups_under_way(config())
    assert found is not None
    # those of former groups, which stay open for seconds, fit beside them
    assert 300 < 2 * found < 1024 - open_files.BASE_FILES
    Limits(monkeypatch, 64, 64)
    assert max_groups_under_way(config()) == 1


@contextmanager
def no_more_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_work_waits_while_no_files_can_be_opened_and_the_servers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generation_module, "OUT_OF_FILES_PAUSE_S", 0.01)

    async def test() -> None:
        async with FakeEngine() as engine, running(tmp_path, [engine.url], unhealthy_after_s=0.05) as it:
            with no_more_files():
                work = asyncio.create_task(it.collect(6))
                await until(lambda: it.metric("out_of_files") >= 6)
                await asyncio.sleep(0.1)
                assert [server.index for server in it.fleet.members()] == [0]
                assert (it.metric("failures/connection"), it.metric("retries"), it.metric("moved_groups")) == (0, 0, 0)
            await work

    run(test())
    assert caplog.text.count("no more files can be opened") == 1
