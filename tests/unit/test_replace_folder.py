"""A finished folder takes the place of a former one, and of nothing else."""

from pathlib import Path

import pytest

from minpro_megatron.monitor.files import check_replaceable, replace_folder


def make(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_former_result_is_replaced_whole(tmp_path: Path) -> None:
    former = make(tmp_path / "model", marker="1", left_over="x")
    replace_folder(make(tmp_path / "new", marker="2"), former, marker="marker")
    assert [file.name for file in former.iterdir()] == ["marker"]
    assert (former / "marker").read_text() == "2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_an_empty_or_absent_folder_is_filled(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", make(tmp_path / "empty")):
        replace_folder(make(tmp_path / "new", marker="2"), folder, marker="marker")
        assert (folder / "marker").read_text() == "2"


def test_a_folder_of_something_else_is_kept(tmp_path: Path) -> None:
    precious = make(tmp_path / "home", thesis="x")
    with pytest.raises(ValueError, match="has no marker, so it is not overwritten"):
        check_replaceable(precious, marker="marker")
    with pytest.raises(ValueError, match="has no marker, so it is not overwritten"):
        replace_folder(make(tmp_path / "new", marker="2"), precious, marker="marker")
    assert (precious / "thesis").read_text() == "x"
