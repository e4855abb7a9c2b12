"""Renders chat templates in a separate process: a template comes with a model and is untrusted code.

Run as a file, isolated from this package. Reads from standard input a JSON object `{"template", "variables",
"questions", "systems", "answer", "reply", "now", "memory_bytes", "cpu_s"}` and writes `{"texts"}` or `{"error"}`. The
environment is the same as in transformers (utils/chat_template_utils.py); the tests check that it does not differ.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks text written by a model, for losses on chats; its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment(now: str | None = None) -> ImmutableSandboxedEnvironment:
    """An environment in which a template cannot access Python's attributes or change its variables. Its clock shows
    `now`, a time as ISO 8601, or the present time."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # jinja2's own filter escapes for HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: (
        datetime.fromisoformat(now) if now else datetime.now()
    ).strftime(form)
    return environment


def render_all(
    template: str,
    variables: dict[str, Any],
    questions: list[str],
    systems: list[str],
    answer: str | None = None,
    reply: dict[str, str] | None = None,
    now: str | None = None,
) -> list[str]:
    """Each question as the user's only turn, after its system message unless that is empty, up to where the assistant
    begins; with an `answer` also the assistant's complete turn; with a `reply`, which is a message, this too, and the
    beginning of the assistant's next turn. `now` is as in make_environment. Raises jinja2.TemplateError."""
    compiled = make_environment(now).from_string(template)
    opens = answer is None or reply is not None
    given = {"tools": None, "documents": None, "add_generation_prompt": opens} | variables
    turn = [] if answer is None else [{"role": "assistant", "content": answer}, *([reply] if reply else [])]
    chats = [
        [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}, *turn]
        for text, system in zip(questions, systems, strict=True)
    ]
    return [compiled.render(messages=chat, **given) for chat in chats]


def main() -> None:
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"], request["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_s"], request["cpu_s"]))
    try:
        names = ("template", "variables", "questions", "systems", "answer", "reply", "now")
        answer = {"texts": render_all(*(request[name] for name in names))}
    except Exception as error:  # a template's errors may be of any type
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
