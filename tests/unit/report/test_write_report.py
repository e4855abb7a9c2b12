"""The report of a run that goes on or ended early, by hand."""

from pathlib import Path

import pytest

from minpro_megatron.commands.report import main
from minpro_megatron.monitor.samples import write_samples
from tests.support.report_pages import assert_safe, history, write_run


def test_a_run_that_goes_on_gets_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, history(2))
    for _ in range(2):  # and once more later
        assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'report.html'}\n")
    assert "2 of 4" in assert_safe((tmp_path / "report.html").read_text()).text


def test_a_finished_run_keeps_its_samples(tmp_path: Path) -> None:
    write_run(tmp_path, history(2))
    (tmp_path / "report.html").write_text("the trainer's")
    write_samples(tmp_path, [{"step": 0, "response": "forty-two"}])
    assert main([str(tmp_path)]) == 0
    assert "forty-two" in assert_safe((tmp_path / "report.html").read_text()).text


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no metrics.jsonl in it")
    assert list(tmp_path.iterdir()) == []
