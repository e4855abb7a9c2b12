"""The README's status box says of GPUs what the record of the checks says."""

from dataclasses import replace

import pytest

from docs.generator.status import README, RECORDS, with_status
from minpro_megatron.gpu_checks.pages import record_page, status_line
from minpro_megatron.gpu_checks.record import PAGE_NAME, CheckResult, Record, read_record

RECORD = Record(
    "2026-12-03T10:00:00+00:00",
    "0123abc",
    "cuda",
    {"GPU": "NVIDIA H200"},
    [CheckResult("log_probs", "passed", 1, 2), CheckResult("abort", "failed", 1, 2, problems=["late"])],
)


def test_the_readme_agrees_with_the_record() -> None:
    readme = README.read_text(encoding="utf-8")
    assert with_status(readme) == readme, "run: python -m docs.generator"


def test_the_page_agrees_with_the_record() -> None:
    record = read_record(RECORDS)
    page = RECORDS / PAGE_NAME
    assert page.is_file() == (record is not None)
    if record is not None:
        assert page.read_text(encoding="utf-8") == record_page(record)
        assert (record.device, record.commit != "") == ("cuda", True)


def test_a_record_replaces_the_line_and_nothing_else() -> None:
    readme = README.read_text(encoding="utf-8")
    found = with_status(readme, RECORD)
    joined = " ".join(found.replace("\n>", "").split())
    assert " ".join(status_line(RECORD).split()) in joined
    assert "1 of 2 checks passed on one NVIDIA H200" in joined
    assert "no run on a GPU has been recorded" not in joined
    assert max(map(len, found.splitlines())) <= max(*map(len, readme.splitlines()), 120)
    assert with_status(found, RECORD) == found
    later = with_status(found, replace(RECORD, date="2027-01-01"))
    assert "2027-01-01" in later
    assert "2026-12-03" not in later


def test_a_readme_without_the_line_is_an_error() -> None:
    with pytest.raises(ValueError, match="the status box must have one item"):
        with_status("> **Status**\n", RECORD)
