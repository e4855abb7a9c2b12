"""The tool calls in a turn: JSON objects as chat templates present tools, or blocks of Python code.

The forms are those of CTPO's agent loop (arXiv:2605.07331): calls in JSON count first; without any, every fenced block
of Python is a call. The block form needs no knowledge of a tool's JSON, so base models find it early.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

TOOL = "code_interpreter"
_JSON_CALL = re.compile(r'\{\s*"name"\s*:')
_BLOCK_BEGIN, _BLOCK_END = re.compile(r"```(?:python|py)?[ \t]*\n"), re.compile(r"\n[ \t]*```")
_DECODER = json.JSONDecoder()


class BadCall(ValueError):
    """A call in JSON that cannot be run; the message is for the policy."""


def tool_calls(text: str) -> list[str | BadCall]:
    """The code of each call in the text, in order; a BadCall for one that cannot be run.

    Takes time proportional to the length of the text, whatever a policy writes: the collector waits meanwhile.

    >>> tool_calls("I compute it.\\n```python\\nprint(1)\\n```")
    ['print(1)']
    """
    in_json = [_code_of(call) for call in _json_calls(text)]
    return in_json or [code for block in _blocks(text) if (code := block.strip())]


def _blocks(text: str) -> Iterator[str]:
    """The contents of the fenced blocks. After the first one without an end there is none: looking for the end of each
    later one would read the rest of the text again."""
    place = 0
    while (begin := _BLOCK_BEGIN.search(text, place)) and (end := _BLOCK_END.search(text, begin.end())):
        yield text[begin.end() : end.start()]
        place = end.end()


def _json_calls(text: str) -> Iterator[dict[str, Any]]:
    place = 0
    while found := _JSON_CALL.search(text, place):
        try:
            call, place = _DECODER.raw_decode(text, found.start())
        except json.JSONDecodeError as error:
            place = max(found.end(), error.pos)  # not again inside an object that is broken after it
            continue
        except (ValueError, RecursionError):  # a number of too many digits, or too deep: no call
            return
        if isinstance(call.get("name"), str) and "arguments" in call:
            yield call


def _code_of(call: dict[str, Any]) -> str | BadCall:
    if call["name"] != TOOL:
        return BadCall(f"there is no tool {call['name'][:80]!r}; the tool is {TOOL!r}")
    arguments = call["arguments"]
    if isinstance(arguments, str):  # some chat templates present the arguments as a text of JSON
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    code = arguments.get("code") if isinstance(arguments, dict) else None
    if not isinstance(code, str) or not code.strip():
        return BadCall(f'the arguments of {TOOL} are {{"code": "..."}}')
    block = next(_blocks(code), None)
    return code if block is None else block.strip()
