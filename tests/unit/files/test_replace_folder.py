"""A finished folder takes the place of a former one, and of nothing else."""

from pathlib import Path

import pytest

from minpro_megatron.files.replacement import LIST_OF_FILES, begin_folder, check_replaceable, finish_folder, new_folder


def write(folder: Path, **files: str) -> Path:
    with new_folder(folder) as new:
        for name, text in files.items():
            (new / name).write_text(text)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_former_result_is_replaced_whole(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", config="1", weights="x")
    write(folder, config="2")
    assert names_in(folder) == [LIST_OF_FILES, "config"]
    assert (folder / "config").read_text() == "2"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_an_empty_or_absent_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty", "absent/parents/too"):
        assert (write(tmp_path / name, config="2") / "config").read_text() == "2"


@pytest.mark.parametrize("place", ["notes.md", "checkpoint-500/optimizer.pt", ".hidden", "link"])
def test_a_file_that_was_added_to_a_former_result_keeps_it(tmp_path: Path, place: str) -> None:
    folder = write(tmp_path / "model", config="1")
    added = folder / place
    added.parent.mkdir(exist_ok=True)
    added.symlink_to(tmp_path) if place == "link" else added.write_text("precious")
    with pytest.raises(ValueError, match=rf"did not write there \({place}\), so it is not replaced"):
        write(folder, config="2")
    assert (folder / "config").read_text() == "1"
    assert added.exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_kept_and_its_first_files_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "trainer_output"
    folder.mkdir()
    for number in range(5):
        (folder / f"file{number}").write_text("precious")
    with pytest.raises(ValueError, match=r"\(file0, file1, file2 and 2 more\)"):
        check_replaceable(folder)
    with pytest.raises(ValueError, match="is a file"):
        check_replaceable(folder / "file0")


def test_a_file_that_appears_meanwhile_is_kept_too(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", config="1")
    temporary = begin_folder(folder)
    (folder / "notes.md").write_text("precious")
    with pytest.raises(ValueError, match=r"notes\.md"):
        finish_folder(temporary, folder)
    assert (folder / "notes.md").exists()


def test_what_an_interrupted_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (begin_folder(folder) / "half").write_text("x")  # and then the process was killed
    assert names_in(write(folder, config="1")) == [LIST_OF_FILES, "config"]
    foreign = tmp_path / ".model.partial"
    foreign.mkdir()
    (foreign / "thesis").write_text("precious")
    with pytest.raises(ValueError, match="this program did not write it"):
        write(folder, config="2")
    assert (foreign / "thesis").exists()


def test_an_error_leaves_the_former_result(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", config="1")

    def interrupted() -> None:
        with new_folder(folder) as new:
            (new / "config").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (folder / "config").read_text() == "1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
