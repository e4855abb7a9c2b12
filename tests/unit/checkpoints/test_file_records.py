"""Files are recorded as they are written, and a file that has changed since is refused."""

from pathlib import Path

import msgspec
import pytest

from minpro_megatron.checkpoints import file_records as file_records_module
from minpro_megatron.checkpoints.file_records import file_records, record_file, verify_files
from minpro_megatron.checkpoints.manifest import ModelManifest
from tests.support.tiny_architecture import TINY


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_records_module, "_ALWAYS_VERIFIED_BYTES", 50)
    folder = tmp_path
    for name, content in (("small", "a" * 10), ("large", "b" * 100)):
        (folder / name).write_text(content)
    files = {name: record_file(folder / name) for name in ("small", "large")}
    found = ModelManifest(source="test", dtype="bfloat16", architecture=TINY, files=files)
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
        left = msgspec.structs.replace(found, files={name: found.files[name]})
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
