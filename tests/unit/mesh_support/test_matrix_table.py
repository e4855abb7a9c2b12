"""The matrix's record is read back as it was written, and runs add to it."""

from dataclasses import replace
from pathlib import Path

from tests.mesh.matrix_table import Row, read_rows, write_rows

ROW = Row("moe", "TP2 PP1", "2", "packed", "1.0e-07", "2.0e-07", "3.0e-06", "model.norm.weight", "4.0e-05", "1.5")


def test_rows_come_back_and_are_added_to(tmp_path: Path) -> None:
    path = tmp_path / "result.md"
    assert read_rows(path) == {}
    write_rows(path, {ROW.key: ROW}, 3, "1 and 2")
    worse = replace(ROW, packing="unpacked", update="9.0e-01")
    write_rows(path, read_rows(path) | {worse.key: worse}, 3, "1 and 2")
    assert read_rows(path) == {ROW.key: ROW, worse.key: worse}
    assert "2 of 3 cases. Largest differences: loss 1.0e-07, gradient norm 2.0e-07" in path.read_text()
    assert "update 9.0e-01" in path.read_text()
