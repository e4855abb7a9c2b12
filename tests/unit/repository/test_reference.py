"""The reference pages are what the code gives."""

from docs.generator.pages import FOLDER, all_pages


def test_every_page_is_what_the_code_gives() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    expected = {path.name: text for path, text in all_pages().items()}
    changed = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    assert changed == [], "run: python -m docs.generator"
