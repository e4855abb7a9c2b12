"""Where the Python files of Transformer Engine are looked for, and what the message says without them."""

from pathlib import Path

import pytest

from minpro_megatron.errors import UserError
from minpro_megatron.rehearsal.transformer_engine import files
from tests.support.documents import ROOT


def package_in(folder: Path, version: str) -> Path:
    (folder / "transformer_engine" / "pytorch").mkdir(parents=True)
    (folder / "transformer_engine" / "pytorch" / "__init__.py").touch()
    metadata = folder / f"transformer_engine-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n")
    return folder


def test_the_named_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(files.VARIABLE, str(package_in(tmp_path, files.VERSION)))
    assert files.find_folder() == tmp_path


def test_else_that_of_the_virtual_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(files.VARIABLE, raising=False)
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    made = package_in(tmp_path / files.FOLDER, files.VERSION)
    assert files.find_folder() == made


@pytest.mark.parametrize(("version", "words"), [("", "no Python files"), ("2.19.0", "has Transformer Engine 2.19.0")])
def test_without_it_one_line_tells_how_to_get_it(
    version: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(files.VARIABLE, str(package_in(tmp_path, version) if version else tmp_path))
    with pytest.raises(UserError, match=rf"^rehearse: .*{words}.* `make transformer-engine-python`") as raised:
        files.find_folder()
    assert len(raised.value.problems) == 1


def test_the_version_is_that_of_gpu_machines() -> None:
    pins = (ROOT / "environment" / "constraints_gpu.txt").read_text(encoding="utf-8").splitlines()
    assert f"transformer-engine=={files.VERSION}" in pins
    assert f"TE_PYTHON := $(VENV)/{files.FOLDER}" in (ROOT / "Makefile").read_text(encoding="utf-8")
