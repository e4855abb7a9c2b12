"""Which parts of a turn are tool calls, and what the policy reads of an outcome."""

import json
import time

import pytest

from minpro_megatron.environments.python_tool.calls import BadCall, tool_calls
from minpro_megatron.environments.python_tool.outcome import NOTHING, Outcome, outcome


def in_json(**arguments: object) -> str:
    return json.dumps({"name": "code_interpreter", "arguments": arguments})


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("the answer is 4", []),
        ("```python\nprint(1)\n```", ["print(1)"]),
        ("```py\nprint(1)\n```", ["print(1)"]),
        ("```\nprint(1)\n```", ["print(1)"]),
        ("first\n```python\na = 1\nprint(a)\n```\nthen\n```python\nprint(2)\n```", ["a = 1\nprint(a)", "print(2)"]),
        ("```python\n\n```", []),
        ("```python\nprint(1)", []),  # not closed
        ("```cpp\nint a;\n```", []),
        (f"<tool_call>\n{in_json(code='print(1)')}\n</tool_call>", ["print(1)"]),
        (in_json(code="print('{}')", timeout=3), ["print('{}')"]),
        (f"{in_json(code='print(1)')} and {in_json(code='print(2)')}", ["print(1)", "print(2)"]),
        (f"{in_json(code='print(1)')}\n```python\nprint(2)\n```", ["print(1)"]),  # JSON counts first
        (in_json(code="```python\nprint(1)\n```"), ["print(1)"]),
        (json.dumps({"name": "code_interpreter", "arguments": json.dumps({"code": "x"})}), ["x"]),
        ('{"name": "code_interpreter", "arguments": {"code": "print(1)"', []),  # not closed
        ('{"name": 3, "arguments": {}}', []),
        ("{" * 3000 + '"name":', []),
    ],
)
def test_calls_are_json_or_blocks_of_code(text: str, calls: list[str]) -> None:
    assert tool_calls(text) == calls


def seconds_for(text: str) -> float:
    began = time.process_time()
    tool_calls(text)
    return time.process_time() - began


@pytest.mark.parametrize("unit", ["x```\n", '{"name":[', '{"name":{"name":', "```py ", "\n   ``"])
@pytest.mark.parametrize("enclosed", [False, True])
def test_no_text_takes_longer_than_in_proportion_to_its_length(unit: str, enclosed: bool) -> None:
    """Beginnings of blocks and of objects without an end: 60,000 characters of the first unit once took 8 s, in which
    the collector answered nobody."""
    text = unit * (120_000 // len(unit))
    assert seconds_for(in_json(code=text) if enclosed else text) < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "search", "arguments": {"code": "x"}}, "there is no tool 'search'"),
        ({"name": "code_interpreter", "arguments": {}}, "the arguments of code_interpreter are"),
        ({"name": "code_interpreter", "arguments": {"code": " "}}, "the arguments of code_interpreter are"),
        ({"name": "code_interpreter", "arguments": "not json"}, "the arguments of code_interpreter are"),
        ({"name": "code_interpreter", "arguments": [1]}, "the arguments of code_interpreter are"),
    ],
)
def test_a_call_that_cannot_be_run_says_why(call: dict, message: str) -> None:
    (found,) = tool_calls(json.dumps(call))
    assert isinstance(found, BadCall)
    assert message in str(found)


@pytest.mark.parametrize(
    ("output", "problem", "found"),
    [
        ("2\n", "", Outcome("2")),
        ("", "", Outcome(NOTHING)),
        ("", "it was ended", Outcome("error: it was ended", "it was ended")),
        ("a\n", "it was ended", Outcome("a\nerror: it was ended", "it was ended")),
        ("0123456789abcdef", "", Outcome("01234\n... (6 characters left out)\nbcdef")),
    ],
)
def test_an_outcome_is_the_output_cut_in_its_middle_and_the_problem(output: str, problem: str, found: Outcome) -> None:
    assert outcome(output, problem, max_chars=10) == found
