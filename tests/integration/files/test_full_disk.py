"""A full disk is one line with folder, free and needed bytes, and the next try finds nothing in its way."""

import asyncio
import errno
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.conversion.convert import to_hf, to_megatron
from minpro_megatron.errors import ProjectError
from minpro_megatron.files.disk_space import DiskFullError, as_size, is_full, naming_full_disk
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.launch import launcher
from minpro_megatron.launch.preflight import run_checks as preflight
from tests.support.hf_models import MIXTURE, Watch, make_model
from tests.support.run_examples import example_config, write_example_files
from tests.support.small_disk import fill, make_room, small_disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


class FillingWatch(Watch):
    """Something else fills the disk while the job `what` is at work."""

    def __init__(self, disk: Path, what: str, leave: int = 0) -> None:
        super().__init__()
        self._disk, self._what, self._leave = disk, what, leave

    @contextmanager
    def __call__(self, what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
        if what == self._what:
            fill(self._disk, self._leave)
        with super().__call__(what, num_bytes) as announce:
            yield announce


@pytest.mark.parametrize("leave", [0, 4096, 12288])
@pytest.mark.parametrize("command", ["to-megatron", "to-hf"])
def test_a_conversion_that_fills_the_disk_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, disk: Path, command: str, leave: int
) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    to_megatron(hf, tmp_path / "megatron", Watch())

    def convert(watch: Watch) -> None:
        if command == "to-megatron":
            to_megatron(hf, disk / "output", watch)
        else:
            to_hf(tmp_path / "megatron", disk / "output", watch)

    with pytest.raises(DiskFullError) as caught:
        convert(FillingWatch(disk, "writing", leave))
    (line,) = caught.value.problems
    assert line.startswith(f"--output = {disk}/output: no space is left on the file system of {disk}, or a quota is")
    assert line.endswith("needed; free some space or choose another folder")
    assert " kB free, " in line
    assert [path.name for path in disk.iterdir()] == ["filler"]
    make_room(disk)
    convert(Watch())
    assert (disk / "output" / ("manifest.json" if command == "to-megatron" else "model.safetensors")).is_file()


def test_a_conversion_that_cannot_fit_is_refused_before_it_writes(tmp_path: Path, disk: Path) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    fill(disk)
    with pytest.raises(ProjectError, match=rf"0.0 kB free on the file system of {disk}, \d+\.\d kB needed; free some"):
        to_megatron(hf, disk / "a" / "output", Watch())
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_journal_that_does_not_fit_is_named_and_can_be_opened_later(disk: Path) -> None:
    fill(disk)
    with pytest.raises(JournalError) as caught:
        asyncio.run(Journal.open(disk / "run"))
    assert f"{disk}/run/journal.sqlite: cannot be opened (no space is left on the file system of {disk}/run" in str(
        caught.value
    )
    assert "0.0 kB free; free some space, then launch again)" in str(caught.value)
    make_room(disk)

    async def open_and_close() -> None:
        await (await Journal.open(disk / "run")).close()

    asyncio.run(open_and_close())


@pytest.mark.parametrize("leave", [0, 4096])
def test_a_run_whose_settings_do_not_fit_is_one_line_and_starts_later(
    tmp_path: Path, disk: Path, leave: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of free space before the start does not see what a quota leaves; here it is left out."""
    started: list[list[str]] = []

    class NothingStarted:
        def __init__(self, commands: list[str], *_: object) -> None:
            started.append(commands)
            raise KeyboardInterrupt

    write_example_files(tmp_path)
    config = example_config(tmp_path, runs_dir=str(disk))
    monkeypatch.setattr(launcher, "load_recipe", lambda _: config)
    monkeypatch.setattr(preflight, "_disk_space", lambda _: [])
    monkeypatch.setattr(launcher, "Supervisor", NothingStarted)
    fill(disk, leave)
    with pytest.raises(DiskFullError, match=rf"^runs_dir = {disk}: no space is left on the file system of {disk}") as e:
        launcher.launch("recipe", [])
    assert e.value.problems[0].endswith("free; free some space or choose another runs_dir=...")
    assert not started
    assert not [path for path in disk.rglob("*") if path.name.endswith(".tmp")]
    make_room(disk)
    with pytest.raises(KeyboardInterrupt):
        launcher.launch("recipe", [])
    assert (config.run_dir / "run.json").is_file()


def test_a_file_that_cannot_be_replaced_stays_and_leaves_nothing(disk: Path) -> None:
    replace_file(disk / "a.json", "{}")
    fill(disk)
    with pytest.raises(OSError, match="No space left"):
        replace_file(disk / "a.json", "x" * 5000)
    assert sorted(path.name for path in disk.iterdir()) == ["a.json", "filler"]
    assert (disk / "a.json").read_text() == "{}"


def test_only_full_disks_are_renamed(tmp_path: Path) -> None:
    for error in (OSError(errno.EIO, "I/O error"), ValueError("x"), sqlite3.OperationalError("database is locked")):
        assert not is_full(error)
        with pytest.raises(type(error)) as caught, naming_full_disk(tmp_path, "x", "y"):
            raise error
        assert caught.value is error
    assert is_full(OSError(errno.EDQUOT, "Disk quota exceeded"))

    def fail() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("the writer failed") from error

    with (
        pytest.raises(DiskFullError, match=r"1\.5 MB needed; free some space or y$"),
        naming_full_disk(tmp_path, "x", "y", 1_500_000),
    ):
        fail()


def test_sizes() -> None:
    assert [as_size(size) for size in (0, 3100, 250_000, 99_000_000, 123_000_000_000)] == [
        "0.0 kB", "3.1 kB", "0.2 MB", "99.0 MB", "123.0 GB"
    ]  # fmt: skip
