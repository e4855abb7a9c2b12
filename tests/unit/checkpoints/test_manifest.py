"""A Megatron folder is what its manifest says, or refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.checkpoints import manifest as manifest_module
from minpro_megatron.checkpoints.manifest import (
    Manifest,
    check_architecture,
    file_records,
    read_manifest,
    record_file,
    verify_files,
    write_manifest,
)
from tests.support.tiny_architecture import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in (("small", "a" * 10), ("large", "b" * 100)):
        (tmp_path / name).write_text(content)
    with file_records(tmp_path) as written:
        written.add("small")
        written.add("large")
        files = written.records()
    write_manifest(tmp_path, Manifest(source="test", dtype="bfloat16", architecture=TINY, files=files))
    return tmp_path


def test_a_manifest_is_read_back(folder: Path) -> None:
    found = read_manifest(folder)
    assert found.architecture == TINY
    assert {name: record.bytes for name, record in found.files.items()} == {"small": 10, "large": 100}
    # as `sha256sum` gives it
    assert found.files["small"].sha256 == "bf2cb58a68f684d95a3b78ef8f661c9a4e5b09e82cc8f9cc88cce90528caeb27"
    announced: list[int] = []
    verify_files(folder, found, thoroughly=True, announce=announced.append)
    assert sum(announced) == 110


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, r"manifest.json: format_version = 1: .*; convert again"),
        ({"architecture": None}, r"manifest.json: architecture: .*; convert again"),
        ({"dtype": "int8"}, r"manifest.json: dtype = int8: .*; convert again"),
    ],
)
def test_another_manifest_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=message):
        read_manifest(folder)


def test_a_missing_or_damaged_manifest_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no manifest.json, .*; run `minpro convert"):
        read_manifest(folder / "absent")
    (folder / "manifest.json").write_text('{"format_version": 2')
    with pytest.raises(ValueError, match=r"manifest.json: content: Invalid JSON.*; convert again"):
        read_manifest(folder)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    check_architecture(folder, read_manifest(folder), TINY)
    with pytest.raises(
        ValueError, match=r"num_layers = 2, but the Hugging Face config.json says 6; convert that model"
    ):
        check_architecture(folder, read_manifest(folder), replace(TINY, num_layers=6))


def test_a_changed_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_ALWAYS_VERIFIED_BYTES", 50)
    found = read_manifest(folder)
    (folder / "large").write_text("c" * 100)
    verify_files(folder, found)  # a large file, of the same size: only a thorough look finds it
    with pytest.raises(ValueError, match=r"large: its SHA-256 is not the one in manifest.json; convert again"):
        verify_files(folder, found, thoroughly=True)
    (folder / "small").write_text("c" * 10)
    with pytest.raises(ValueError, match=r"small: its SHA-256 is not the one"):
        verify_files(folder, found)
    (folder / "large").write_text("")
    (folder / "small").unlink()
    for name, what in (("large", "0 bytes"), ("small", "no such file")):
        left = found.model_copy(update={"files": {name: found.files[name]}})
        with pytest.raises(ValueError, match=rf"{name}: {what}, but manifest.json says \d+ bytes; convert again"):
            verify_files(folder, left)


def test_a_file_is_recorded_as_it_is_written(tmp_path: Path) -> None:
    pieces = [b"a", b"b" * 200_000, memoryview(b"c" * 70_000), b""]
    with file_records(tmp_path) as written:
        file = written.create("data")
        assert [file.write(piece) for piece in pieces] == [1, 200_000, 70_000, 0]
        assert file.tell() == 270_001
        with pytest.raises(AssertionError, match="still open: data"):
            written.records()
        written.close("data")
        assert written.records() == {"data": record_file(tmp_path / "data")}
    assert (tmp_path / "data").read_bytes() == b"".join(pieces)
