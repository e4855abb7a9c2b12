"""The reference pages are what the code gives."""

from pathlib import Path

import pytest

from tools.write_reference import ROOT, pages

PAGES = pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_page_is_what_the_code_gives(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == PAGES[page], "run: python tools/write_reference.py"


def test_no_other_page_claims_to_be_generated() -> None:
    claims = {path for path in (ROOT / "docs").rglob("*.md") if "Do not edit" in path.read_text(encoding="utf-8")}
    assert claims == PAGES.keys()
