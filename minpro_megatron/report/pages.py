"""Self-contained HTML pages, and the escaping of text from outside."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from minpro_megatron.terminal_text import visible

KEPT = "\n\t"  # control characters that a browser shows as what they are
MAX_CHARACTERS = 2000  # of one text: a page with a hundred long responses is not readable


def render(template: str, content: Mapping[str, Any]) -> str:
    """The page of `template` with `content`. Every text is escaped; only Markup is inserted as HTML."""
    return _environment().get_template(template).render(content)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_fit,
    )


def _fit(value: object) -> object:
    return visible(value, keep=KEPT) if isinstance(value, str) and not isinstance(value, Markup) else value


def short(value: object, longest: int = MAX_CHARACTERS) -> str:
    """The value as text, truncated if it is long."""
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json_text(value)
    return text if len(text) <= longest else f"{text[:longest]} ... ({len(text)} characters)"


def json_text(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None or share != share else f"{100 * share:.{digits}f} %"


def reward_text(reward: float | None) -> str:
    """A mean reward as text; its unit depends on the grader."""
    return "-" if reward is None or reward != reward else f"{reward:.3f}"


def first_known(content: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of these fields that the content has, as text."""
    return next((short(content[name]) for name in names if content.get(name) is not None), "")
