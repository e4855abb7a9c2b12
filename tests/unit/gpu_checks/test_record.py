"""The record of the checks: stored and read, as a page, and as the README's status."""

from dataclasses import replace
from pathlib import Path

import pytest

from minpro_megatron.errors import UserError
from minpro_megatron.gpu_checks.pages import record_page, status_line
from minpro_megatron.gpu_checks.record import JSON_NAME, CheckResult, Record, read_record, write_record

RECORD = Record(
    date="2026-12-03T10:00:00+00:00",
    commit="0123abc",
    device="cuda",
    machine={"GPU": "NVIDIA H200", "driver": "580.1", "torch": "2.14.1"},
    results=[
        CheckResult("log_probs", "passed", 31.25, 100, {"ours_ms": 41.234567, "bytes": 1234567}, ["ours_ms <= 50"]),
        CheckResult("abort", "failed", 9.0, 60, {"ending": "a | b"}, [], ["closing did not return"]),
        CheckResult("snapshots", "error", 100.0, 100, problems=["it did not end in 100 s", "Traceback"]),
        CheckResult("te_resume", "skipped", 0.4, 90, problems=["Transformer Engine is not installed"]),
    ],
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    write_record(tmp_path, RECORD, record_page(RECORD))
    assert read_record(tmp_path) == RECORD


@pytest.mark.parametrize("text", ["{", "[]", '{"results": [{}]}', '{"results": 1}', "null"])
def test_a_damaged_record_is_an_error_with_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / JSON_NAME).write_text(text)
    with pytest.raises(UserError, match=f"{JSON_NAME}: this is no record of GPU checks"):
        read_record(tmp_path)


def test_the_page_has_machine_figures_limits_and_what_failed() -> None:
    page = record_page(RECORD)
    assert "commit 0123abc. GPU NVIDIA H200, driver 580.1, torch 2.14.1." in page
    assert "| `log_probs` | passed | 31.2 | 100 | ours_ms 41.23, bytes 1,234,567; limits: ours_ms <= 50 |" in page
    assert "| `abort` | failed | 9.0 | 60 | ending a \\| b |" in page
    assert "`snapshots` (error):\n\n```text\nit did not end in 100 s\nTraceback\n```" in page
    assert "`log_probs` (" not in page


def test_the_status_counts_what_ran_and_names_what_did_not_pass() -> None:
    line = status_line(RECORD)
    assert "1 of 3 checks passed on one NVIDIA H200, 2026-12-03" in line
    assert "Not passed: `abort`, `snapshots`." in line
    assert "Not run: `te_resume`." in line
    passed = status_line(replace(RECORD, results=RECORD.results[:1]))
    assert "1 of 1 checks passed" in passed
    assert "Not passed" not in passed
    assert "have not been run" in passed  # what one GPU cannot show


def test_without_a_record_the_status_says_so() -> None:
    assert "nothing yet; no run on a GPU has been recorded" in status_line(None)
