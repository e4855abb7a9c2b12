"""Renders chat templates in a process of its own: a template comes with a model and is a program like any other.

Run as a file, isolated from this package. Reads from standard input a JSON object `{"template", "variables",
"questions", "answer", "memory_bytes", "cpu_s"}` and writes `{"texts"}` or `{"error"}`. The environment is the one of
transformers (utils/chat_template_utils.py), from which the tests check that it does not differ.
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
    """`{% generation %}` marks what a model wrote, for losses on chats; what is in it is rendered as it stands."""

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


def make_environment() -> ImmutableSandboxedEnvironment:
    """Where a template can reach neither Python's attributes nor change what it is given."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # jinja2's own escapes for HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def render_all(template: str, variables: dict[str, Any], questions: list[str], answer: str | None = None) -> list[str]:
    """Each question as the user's only turn, up to where the assistant begins; with an `answer` also the assistant's
    turn, to its end. Raises jinja2.TemplateError."""
    compiled = make_environment().from_string(template)
    given = {"tools": None, "documents": None, "add_generation_prompt": answer is None} | variables
    turn = [] if answer is None else [{"role": "assistant", "content": answer}]
    return [compiled.render(messages=[{"role": "user", "content": text}, *turn], **given) for text in questions]


def main() -> None:
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"], request["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_s"], request["cpu_s"]))
    try:
        answer = {"texts": render_all(*(request[name] for name in ("template", "variables", "questions", "answer")))}
    except Exception as error:  # a template's mistakes surface as any kind
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
