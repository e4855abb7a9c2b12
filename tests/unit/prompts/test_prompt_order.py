"""The order of prompts: shares of the sources, epochs of each, easy ones first; all of it from seed and group id."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.config.run import RunConfig, parse_run_config
from minpro_megatron.prompts.prompt_order import BLOCK_GROUPS, EpochOrder, SourceDraw
from minpro_megatron.prompts.prompts import PromptStream, TokenizedPrompt, select_prompts
from minpro_megatron.records import Prompt
from tests.support.rollout_fakes import run_config

TOKENS = np.asarray([3], dtype=np.int32)


def prompt(name: str, source: str = "a", pass_rate: float | None = None) -> Prompt:
    return Prompt(id=name, source=source, text="1=", answer="1", pass_rate=pass_rate)


def stream(folder: Path, prompts: list[Prompt], **data: object) -> PromptStream:
    return PromptStream([TokenizedPrompt(one, TOKENS) for one in prompts], settings(folder, **data))


def settings(folder: Path, **data: object) -> RunConfig:
    values = run_config(folder).model_dump()
    return parse_run_config(values | {"data": values["data"] | data})


def dealt(prompts: PromptStream, count: int) -> list[Prompt]:
    return [prompts.group(group_id, -1, 0).prompt for group_id in range(count)]


def test_sources_get_their_shares_and_each_its_own_epochs(tmp_path: Path) -> None:
    prompts = [prompt(f"{source}{n}", source) for source, size in (("a", 3), ("b", 40), ("c", 5)) for n in range(size)]
    made = dealt(stream(tmp_path, prompts, source_weights={"a": 3, "b": 1, "c": 0}), 4000)
    shares = Counter(one.source for one in made)
    assert set(shares) == {"a", "b"}
    assert 0.72 < shares["a"] / 4000 < 0.78  # 4 standard errors of a share of 3/4
    for source, size in (("a", 3), ("b", 40)):
        mine = [one.id for one in made if one.source == source]
        for first in range(0, len(mine) - size, size):
            assert len(set(mine[first : first + size])) == size
        assert mine[:size] != mine[size : 2 * size] or mine[:size] != mine[2 * size : 3 * size]


def test_the_group_id_is_the_whole_cursor(tmp_path: Path) -> None:
    """Far groups first, near ones after: whatever was asked before, and for a stream that begins anywhere."""
    prompts = [prompt(f"{source}{n}", source) for source in "ab" for n in range(7)]
    weights = {"a": 1, "b": 2.5}
    forward = stream(tmp_path, prompts, source_weights=weights)
    ids = [*range(20), *range(BLOCK_GROUPS - 3, BLOCK_GROUPS + 3), 3 * BLOCK_GROUPS + 5, 9 * BLOCK_GROUPS]
    there = {group_id: forward.group(group_id, 0, 0).prompt.id for group_id in ids}
    backward = stream(tmp_path, prompts, source_weights=weights)
    assert {group_id: backward.group(group_id, 0, 0).prompt.id for group_id in reversed(ids)} == there
    other = stream(tmp_path, prompts, source_weights=weights | {"b": 0.5})
    assert [other.group(group_id, 0, 0).prompt.id for group_id in range(20)] != list(there.values())[:20]


def test_places_count_the_groups_of_the_source_over_blocks() -> None:
    draw = SourceDraw({"a": 1.0, "b": 1.0, "c": 0.0}, seed=3)
    seen: Counter[str] = Counter()
    for group_id in range(2 * BLOCK_GROUPS + 10):
        name, place = draw.place(group_id)
        assert place == seen[name]
        seen[name] += 1
    assert SourceDraw({"a": 1.0, "b": 1.0}, seed=4).place(50) != draw.place(50) or seen["a"] != seen["b"]


def test_blocks_and_sources_have_draws_of_their_own(tmp_path: Path) -> None:
    draw = SourceDraw({"a": 1.0, "b": 1.0}, seed=0)
    first, second = ([draw.place(start + n)[0] for n in range(100)] for start in (0, BLOCK_GROUPS))
    assert first != second
    prompts = [prompt(f"{source}{n}", source) for source in "ab" for n in range(30)]
    made = dealt(stream(tmp_path, prompts, source_weights={"a": 1, "b": 1}), 200)
    orders = {source: [one.id[1:] for one in made if one.source == source][:30] for source in "ab"}
    assert orders["a"] != orders["b"]


def test_easy_prompts_come_first_in_the_first_epoch(tmp_path: Path) -> None:
    rates = [0.1, 0.9, None, 0.5, 0.5, 0.5, 0.9, None]
    prompts = [prompt(f"p{n}", pass_rate=rate) for n, rate in enumerate(rates)]
    made = dealt(stream(tmp_path, prompts, curriculum="easy_first"), 24)
    assert [one.pass_rate for one in made[:8]] == [0.9, 0.9, 0.5, 0.5, 0.5, 0.1, None, None]
    for first in (8, 16):
        epoch = [one.pass_rate for one in made[first : first + 8]]
        assert Counter(epoch) == Counter(rates)
        assert epoch != [one.pass_rate for one in made[:8]]
    by_source = dealt(stream(tmp_path, prompts, curriculum="easy_first", source_weights={"a": 2}), 8)
    assert [one.pass_rate for one in by_source] == [one.pass_rate for one in made[:8]]


def test_equal_pass_rates_are_shuffled() -> None:
    order = EpochOrder(50, 0, "prompt order", [0.0] * 50)
    assert sorted(order[place] for place in range(50)) == list(range(50))
    assert [order[place] for place in range(50)] != list(range(50))


def test_pass_rates_select_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [prompt(f"p{n}", pass_rate=rate) for n, rate in enumerate([0.0, 0.2, 0.5, 0.8, 1.0, None])]
    data = settings(tmp_path, min_pass_rate=0.2, max_pass_rate=0.8).data
    with caplog.at_level(logging.INFO):
        assert [one.id for one in select_prompts(prompts, data)] == ["p1", "p2", "p3"]
    assert "excluded 3 of 6 prompts" in caplog.text
    assert "1 of them without a pass_rate" in caplog.text
    assert select_prompts(prompts, settings(tmp_path).data) == prompts


def test_sources_of_weight_zero_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [prompt("a0"), prompt("b0", "b"), prompt("b1", "b")]
    with caplog.at_level(logging.INFO):
        kept = select_prompts(prompts, settings(tmp_path, source_weights={"a": 1, "b": 0}).data)
    assert [one.id for one in kept] == ["a0"]
    assert "excluded 2 of 3 prompts of sources of weight 0" in caplog.text


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"source_weights": {"a": 1, "x": 1}}, r"^data.source_weights: 'x' is not a source of .*; sources: a, b$"),
        ({"source_weights": {"a": 1}}, r"lacks the source 'b' .*name every source, with weight 0 for those to exclude"),
        (
            {"min_pass_rate": 0.6},
            r"^data.min_pass_rate = 0.6, data.max_pass_rate = 1: none of the 2 .*1 have no pass_r",
        ),
        ({"source_weights": {"a": 0, "b": 1}, "min_pass_rate": 0.1}, "none of the 1 prompts lies between"),
    ],
)
def test_a_selection_that_leaves_nothing_is_refused(tmp_path: Path, data: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        select_prompts([prompt("a0", pass_rate=0.5), prompt("b0", "b")], settings(tmp_path, **data).data)


def test_a_curriculum_needs_pass_rates_and_a_weighted_source_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.curriculum = easy_first: no row .* has a pass_rate; add them, or"):
        select_prompts([prompt("a0")], settings(tmp_path, curriculum="easy_first").data)
    with pytest.raises(ValueError, match=r"^data.source_weights: the source 'b' has weight 2, but the pass rates and"):
        stream(tmp_path, [prompt("a0")], source_weights={"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"source_weights": {"a": 0, "b": 0}}, r"^data: source_weights = .* are all 0: no prompt is left; raise"),
        ({"source_weights": {"a": -1}}, r"^data.source_weights.a: .*greater than or equal to 0"),
        ({"source_weights": {"a": float("inf")}}, r"^data.source_weights.a: .*finite"),
        ({"min_pass_rate": 0.7, "max_pass_rate": 0.2}, r"^data: min_pass_rate = 0.7 exceeds max_pass_rate = 0.2"),
        ({"instruction": "Think."}, r"^data: instruction = 'Think.' must be one of none, dapo, boxed, or a text with"),
        ({"instruction": "{question} {question}"}, "once, where the question goes"),
        ({"chat_template_arguments": {"enable_thinking": False}}, "without chat_template: set chat_template to"),
        ({"curriculum": "hard_first"}, "^data.curriculum: .*'none' or 'easy_first'"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(tmp_path: Path, data: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        settings(tmp_path, **data)
