"""An older start of a run writes nothing once a newer one has the folder, whichever of its processes tries."""

import asyncio
import shutil
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.checkpoints.checkpoint_folder import CheckpointFolder
from minpro_megatron.checkpoints.resume_point import CHECKPOINTS, read_latest
from minpro_megatron.collector.api import CollectorApi
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.errors import RunBlocked
from minpro_megatron.feed.protocol import COLLECTOR_ENDPOINT, COLLECTOR_TOKEN
from minpro_megatron.launch.starts import begin_start
from minpro_megatron.monitor.memory import MemoryStatement
from minpro_megatron.monitor.status import write_status
from minpro_megatron.roles import collect, serve
from minpro_megatron.run_folder.start_fence import StartFence, former_start_at_work, state_end, take_over
from minpro_megatron.serving.endpoints import endpoint_file, read_server_addresses
from tests.support.checkpoint_shards import manifest_of, write_shards
from tests.support.fake_engine import FakeEngine
from tests.support.rollout_fakes import issued_groups, run_config
from tests.support.running_fleet import run, until
from tests.support.serve_settings import config as serve_config

TAKEN = r"name = \S+: start 2 of the run \(on \S+\) has taken over .* from this one \(start 1\), which stops writing"


def make_start(run_dir: Path) -> int:
    start = begin_start(run_dir)
    take_over(run_dir, start.incarnation)
    return start.incarnation


def journal_rows(run_dir: Path) -> int:
    with closing(sqlite3.connect(run_dir / "journal.sqlite")) as connection:
        return connection.execute("SELECT count(*) FROM groups").fetchone()[0]


def test_only_the_newest_start_that_has_changed_something_counts(tmp_path: Path) -> None:
    fence = StartFence(tmp_path, make_start(tmp_path))
    fence.check()
    begin_start(tmp_path)  # refused before it takes the folder over
    fence.check()
    third = make_start(tmp_path)
    with pytest.raises(RunBlocked, match=TAKEN.replace("start 2", "start 3")):
        fence.check()
    StartFence(tmp_path, third).check()


def test_a_role_without_a_launcher_is_not_hindered(tmp_path: Path) -> None:
    StartFence(tmp_path / "absent", 0).check()
    StartFence(tmp_path, 3).check()


@pytest.mark.parametrize("stated", [True, False])
def test_a_start_waits_for_a_former_one_of_another_machine_that_has_not_stated_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stated: bool
) -> None:
    first = make_start(tmp_path)
    assert former_start_at_work(tmp_path, 1) is None
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    if stated:
        state_end(tmp_path, first)
    found = former_start_at_work(tmp_path, 1)
    assert (found is None) == stated
    assert found is None or found[0] == first


def test_the_journal_refuses_an_older_start(tmp_path: Path) -> None:
    async def test() -> None:
        fence = StartFence(tmp_path, make_start(tmp_path))
        older = await Journal.open(tmp_path, fence.check)
        await older.issue(issued_groups([0, 1]))
        make_start(tmp_path)
        with pytest.raises(RunBlocked, match=TAKEN):
            await older.issue(issued_groups([2, 3]))
        await older.close()

    run(test())
    assert journal_rows(tmp_path) == 2


CHANGES: dict[str, Callable[[CheckpointFolder, Path], None]] = {
    "publish": lambda folder, partial: folder.publish(partial, manifest_of(20)),
    "score": lambda folder, partial: folder.note_score(10, 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_older_start_moves_and_removes_no_checkpoint(tmp_path: Path, change: str) -> None:
    fence = StartFence(tmp_path, make_start(tmp_path))
    folder = CheckpointFolder(tmp_path / CHECKPOINTS, CheckpointConfig(keep_last=1), fence.check)
    folder.publish(write_shards(folder.new_partial(10)), manifest_of(10))
    partial = write_shards(folder.new_partial(20))
    make_start(tmp_path)
    before = sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir())
    with pytest.raises(RunBlocked, match=TAKEN):
        CHANGES[change](folder, partial)
    with pytest.raises(RunBlocked, match=TAKEN):
        CheckpointFolder(tmp_path / CHECKPOINTS, CheckpointConfig(), fence.check)
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == before
    assert read_latest(tmp_path) == manifest_of(10)
    folder.discard(partial)  # its own, which nobody else uses
    assert not partial.exists()


def test_an_older_collector_ends_and_leaves_the_files_of_the_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector role while it reads its prompts, beside the interface of the newer one."""
    config = run_config(tmp_path)
    older = make_start(config.run_dir)
    monkeypatch.setattr(collect, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(collect, "read_model_facts", lambda *_: None)
    monkeypatch.setattr(collect, "TextTokenizer", lambda *_: None)
    loading, go_on = threading.Event(), threading.Event()

    def read_prompts(*_: object) -> None:
        loading.set()
        go_on.wait(20)

    monkeypatch.setattr(collect, "_read_prompts", read_prompts)
    files = [config.run_dir / COLLECTOR_ENDPOINT, config.run_dir / COLLECTOR_TOKEN]

    async def test() -> None:
        role = asyncio.create_task(collect._until_terminated(config, older, StartFence(config.run_dir, older)))
        await until(loading.is_set)
        newer = make_start(config.run_dir)
        shutil.rmtree(config.run_dir / "endpoints")
        async with CollectorApi(config.run_dir, "127.0.0.1", 0, newer):
            stated = [file.read_text() for file in files]
            with pytest.raises(RunBlocked, match=TAKEN):
                await role
            assert [file.read_text() for file in files] == stated
        assert not any(file.exists() for file in files)  # the newer one has removed its own
        go_on.set()

    run(test())


def test_an_older_serve_ends_and_leaves_the_addresses_of_the_newer_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    monkeypatch.setattr("minpro_megatron.run_folder.start_fence.LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(serve, "WATCH_INTERVAL_S", 0.005)

    async def test() -> None:
        async with FakeEngine() as engine:
            settings = serve_config(tmp_path, urls=[f"{engine.url}/"], health_interval_s=0.02)
            run_dir = settings.run_dir
            older = make_start(run_dir)
            first = asyncio.create_task(asyncio.to_thread(serve.run, settings, older))
            await until(lambda: bool(read_server_addresses(run_dir, 1, older)))
            newer = make_start(run_dir)
            shutil.rmtree(run_dir / "endpoints")
            second = asyncio.create_task(asyncio.to_thread(serve.run, settings, newer))
            await until(lambda: bool(read_server_addresses(run_dir, 1, newer)))
            assert await first == 2
            await asyncio.sleep(0.1)
            assert endpoint_file(run_dir, 0, newer).exists()
            assert (run_dir / "status" / "serve.json").read_text().count("stopped") == 0
            run_dir.rename(tmp_path / "moved")
            assert await second == 2
            assert not run_dir.exists()

    run(test())
    lines = capsys.readouterr().err.splitlines()
    reasons = [line for line in lines if line.startswith("serve: ")]
    assert len(reasons) == 2, lines
    assert "has taken" in reasons[0]
    assert "is gone: it was removed or renamed" in reasons[1]


def test_what_a_run_says_of_itself_makes_no_folder_of_a_run_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "runs" / "gone"
    with pytest.raises(FileNotFoundError):
        write_status(gone, "serve", "serving")
    MemoryStatement(gone, "serve").tick()
    assert list(tmp_path.iterdir()) == []
