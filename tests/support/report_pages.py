"""Histories of runs, and pages in which no text from outside may become markup."""

import re
from html.parser import HTMLParser

from minpro_megatron.monitor.history import Entry, encode_entry
from tests.support.run_examples import example_config

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def history(steps: int) -> list[Entry]:
    names = ("reward/accuracy", "policy/entropy", "ratio/mean", "ratio/min", "ratio/max", "staleness/mean")
    times = {"time/train_s": 0.5, "time/publish_s": 0.1, "time/step_s": 0.8}
    return [Entry(step, 100.0 + step, dict.fromkeys(names, 0.5) | times) for step in range(steps)]


def write_entries(folder, entries):
    (folder / "metrics.jsonl").write_text("".join(map(encode_entry, entries)))


def write_run(folder, entries):
    (folder / "run.json").write_text(example_config(folder).to_json())
    write_entries(folder, entries)


class Outline(HTMLParser):
    """What a browser makes of a page: its elements, their attributes, and the text outside of style sheets."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._in_style = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements[tag] = self.elements.get(tag, 0) + 1
        self.attributes += [(name, value or "") for name, value in attrs]
        self._in_style = tag == "style"

    def handle_data(self, data):
        self.text += "" if self._in_style else data


def assert_safe(page: str) -> Outline:
    """The page runs nothing and loads nothing, whatever texts are in it."""
    outline = Outline(page)
    assert "\x00" not in page
    assert not {"script", "img", "iframe", "object", "embed", "base", "form", "link"} & outline.elements.keys()
    for name, value in outline.attributes:
        assert not name.startswith("on"), name
        assert name not in ("href", "xlink:href", "src", "action") or value.startswith("#"), (name, value)
    assert not re.search(r"url\((?!#)", page)
    return outline


NASTY = (
    "</script></style></svg>" + HOSTILE + '" onmouseover="alert(1) {{ 7 * 7 }} $\\frac',
    "a\x00b\x1b[2J\u202egnp.exe\ud800",
    "$\\frac{$",
)
