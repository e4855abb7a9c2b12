"""Pass rates in prompt files: which fields are written, that all others keep their bytes, and what is selected."""

import json

import pytest

from minpro_megatron.prompt_sets.pass_rates import Measured, rows_with_pass_rates

# An integer that no float holds, a float that Python prints otherwise, an escape, a field that no prompt has.
AWKWARD = (
    b'{"id": "p\\u00e9", "source": "s", "prompt": "\\u2028 \\ud83d\\ude00", "answer": "1", '
    b'"metadata": {"n": 123456789012345678901234567890, "x": 1e0, "y": [1.50, -0.0]}, "extra": "\\/"}'
)


def measured(**right: int) -> dict[str, Measured]:
    return {name: Measured("base", 8, number) for name, number in right.items()}


def test_all_other_fields_keep_their_bytes() -> None:
    [row] = rows_with_pass_rates([AWKWARD], {"pé": Measured("a model", 3, 1)})
    for kept in (
        '"prompt":"\\u2028 \\ud83d\\ude00"',
        '"metadata":{"n": 123456789012345678901234567890, "x": 1e0, "y": [1.50, -0.0]}',
        '"extra":"\\/"',
    ):
        assert kept in row
    read = json.loads(row)
    assert read.pop("pass_rate") == 1 / 3
    assert read.pop("measured") == {"model": "a model", "samples": 3, "right": 1}
    assert read == json.loads(AWKWARD)


def test_rows_keep_their_order_and_earlier_rates_are_replaced() -> None:
    lines = [b'{"id":"b","pass_rate":0.9,"measured":1}', b"", b'{"id":"a"}', b"  "]
    rows = [json.loads(row) for row in rows_with_pass_rates(lines, measured(a=8, b=0))]
    assert [(row["id"], row["pass_rate"], row["measured"]["right"]) for row in rows] == [("b", 0.0, 0), ("a", 1.0, 8)]
    twice = rows_with_pass_rates(
        [row.encode() for row in rows_with_pass_rates(lines, measured(a=1, b=2))], measured(a=8, b=0)
    )
    assert [json.loads(row) for row in twice] == rows


@pytest.mark.parametrize(("least", "most", "expected"), [(0, 0, ["a"]), (0.25, 0.5, ["b", "c"]), (0.6, 0.9, [])])
def test_only_wanted_rows_are_left(least: float, most: float, expected: list[str]) -> None:
    lines = [f'{{"id":"{name}"}}'.encode() for name in "abcd"]
    rows = rows_with_pass_rates(lines, measured(a=0, b=2, c=4, d=8), lambda found: least <= found.pass_rate <= most)
    assert [json.loads(row)["id"] for row in rows] == expected
