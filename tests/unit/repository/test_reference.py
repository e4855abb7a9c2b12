"""The reference pages are what the code gives."""

import re

from docs.generator.pages import FOLDER, all_pages


def test_every_page_is_what_the_code_gives() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    expected = {path.name: text for path, text in all_pages().items()}
    changed = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    assert changed == [], "run: python -m docs.generator"


def test_every_argument_of_every_command_has_a_help_text() -> None:
    pages = [text for path, text in all_pages().items() if path.name.startswith("commands_")]
    rows = [line for text in pages for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 100
    assert [row for row in rows if re.search(r"` \| *(; required)? *\|$", row)] == []
