"""Stored rollouts: what is refused, in what words, and what becomes of good rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minpro_megatron.config.loss import LossConfig
from minpro_megatron.errors import UserError
from minpro_megatron.records import decode, encode
from minpro_megatron.replay.batches import replay_batches
from minpro_megatron.replay.job import ReplayRows
from minpro_megatron.replay.rollouts import Rollout, read_rollouts
from tests.support.replay_rows import GOOD, VOCABULARY, write_rows


def read(path: Path, *lines: Any, needs: bool = False) -> list[Rollout]:
    return read_rollouts(write_rows(path, *lines), VOCABULARY, needs)


def test_a_row_is_read_as_it_stands(tmp_path):
    first, second = read(tmp_path / "rows", GOOD, {**GOOD, "loss_mask": None, "group": "b"}, "", "  ")
    assert (first.line, first.group, first.reward) == (1, "a", 1.0)
    assert first.prompt_ids.tolist() == [1, 2]
    assert first.response_ids.tolist() == [3, 76, 0]
    assert first.behavior_log_probs.tolist() == [-1.5, -2, 0]
    assert first.loss_mask.tolist() == [1, 0, 1]
    assert first.rollout_log_probs.tolist() == [0, 0, 0]
    assert (second.line, second.group) == (2, "b")
    assert second.loss_mask.tolist() == [1, 1, 1]


KEPT = [[3, 5], [1, 76, 2], [7, 0, 76]]


def test_kept_ids_are_read_with_top_k(tmp_path):
    (found,) = read_rollouts(write_rows(tmp_path / "rows", GOOD | {"kept_ids": KEPT}), VOCABULARY, False, top_k=3)
    assert found.supports is not None
    assert found.supports.tolist() == [2, 3, 3, 3, 5, 1, 76, 2, 7, 0, 76]
    (batch,) = replay_batches([found], None, LossConfig(), 8)
    assert batch.sequences[0].supports is found.supports
    assert decode(Rollout, encode(found)).supports.tolist() == found.supports.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kept", "top_k", "problem"),
    [
        (KEPT, 0, "kept_ids: the response was sampled with sampling.top_k; give --run, or --set sampling.top_k=..."),
        (None, 3, "kept_ids: the field is missing (sampling.top_k needs it)"),
        (KEPT[:2], 3, "kept_ids: has 2 lists for 3 response_ids"),
        ([[3], [76], [7]], 3, "kept_ids[2] = [7]: must contain response_ids[2] = 0"),
        ([[3], [76], []], 3, "kept_ids[2] = []: must contain response_ids[2] = 0"),
        ([[3], [1, 2], [0]], 3, "kept_ids[1] = [1, 2]: must contain response_ids[1] = 76"),  # also masked, see GOOD
        ([[3], [76], [0, 77]], 3, "kept_ids[2][1] = 77: Expected int <= 76"),
    ],
)
def test_kept_ids_that_do_not_fit_are_named(tmp_path, kept, top_k, problem):
    row = GOOD if kept is None else GOOD | {"kept_ids": kept}
    with pytest.raises(UserError) as refused:
        read_rollouts(write_rows(tmp_path / "rows", row), VOCABULARY, False, top_k)
    assert str(refused.value).startswith(f"{tmp_path / 'rows'}: line 1: {problem}")


def test_a_masked_token_may_keep_no_ids(tmp_path):
    row = GOOD | {"kept_ids": [[3, 5], [], [0]]}
    (found,) = read_rollouts(write_rows(tmp_path / "rows", row), VOCABULARY, False, top_k=3)
    assert found.supports is not None
    assert found.supports.tolist() == [2, 0, 1, 3, 5, 0]


def test_a_response_may_be_empty(tmp_path):
    empty = GOOD | {"response_ids": [], "behavior_log_probs": [], "loss_mask": []}
    assert read(tmp_path / "rows", empty)[0].num_tokens == 2


NAN, INF = float("nan"), float("inf")
PROBLEMS = [
    ({"group": 1.5}, "group = 1.5: Expected int | str, got float"),
    ({"prompt_ids": []}, "prompt_ids: it is empty"),
    ({"prompt_ids": [1, 77]}, "prompt_ids[1] = 77: Expected int <= 76"),
    ({"prompt_ids": [-1]}, "prompt_ids[0] = -1: Expected int >= 0"),
    ({"prompt_ids": [True]}, "prompt_ids[0] = true: Expected int, got bool"),
    ({"prompt_ids": [1.0]}, "prompt_ids[0] = 1.0: Expected int, got float"),
    ({"prompt_ids": 5}, "prompt_ids = 5: Expected array, got int"),
    ({"response_ids": [3, "4", 5]}, 'response_ids[1] = "4": Expected int, got str'),
    ({"response_ids": [3, 10**30, 5]}, "response_ids[1] = 1000000000000000000000000000000: Expected int <= 76"),
    ({"response_ids": None}, "response_ids = null: Expected array, got null"),
    ({"response_ids": [3, 4]}, "behavior_log_probs: has 3 numbers for 2 response_ids"),
    ({"behavior_log_probs": [-1, -2]}, "behavior_log_probs: has 2 numbers for 3 response_ids"),
    ({"behavior_log_probs": [-1, NAN, -2]}, "behavior_log_probs[1] = nan: must be a finite number"),
    ({"behavior_log_probs": [-1, -2, -INF]}, "behavior_log_probs[2] = -inf: must be a finite number"),
    ({"behavior_log_probs": [-1, -2, -1e39]}, "behavior_log_probs[2] = -1e+39: must be a finite number"),
    ({"behavior_log_probs": [-1, False, -1]}, "behavior_log_probs[1] = false: Expected float, got bool"),
    ({"reward": NAN}, "reward = nan: must be a finite number"),
    ({"reward": INF}, "reward = inf: must be a finite number"),
    ({"reward": "1"}, 'reward = "1": Expected float, got str'),
    ({"reward": True}, "reward = true: Expected float, got bool"),
    ({"loss_mask": [1, 0]}, "loss_mask: has 2 numbers for 3 response_ids"),
    ({"loss_mask": [1, 2, 0]}, "loss_mask[1] = 2.0: must be 0 or 1"),
    ({"loss_mask": [1, "1", 0]}, 'loss_mask[1] = "1": Expected bool | float, got str'),
    ({"loss_mask": [1, 0.5, 0]}, "loss_mask[1] = 0.5: must be 0 or 1"),
]


@pytest.mark.parametrize(("change", "problem"), PROBLEMS, ids=str)
def test_a_bad_value_is_refused_with_file_line_and_field(tmp_path, change, problem):
    file = tmp_path / "rows.jsonl"
    with pytest.raises(UserError) as raised:
        read(file, GOOD, GOOD | change, GOOD)
    assert any(line.startswith(f"{file}: line 2: {problem}") for line in raised.value.problems), raised.value
    assert all(line.startswith(f"{file}: line 2: ") for line in raised.value.problems)


@pytest.mark.parametrize("field", ["group", "prompt_ids", "response_ids", "behavior_log_probs", "reward"])
def test_a_missing_field_is_refused(tmp_path, field):
    with pytest.raises(UserError, match=rf"line 1: {field}: the field is missing"):
        read(tmp_path / "rows", {name: value for name, value in GOOD.items() if name != field})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{'group': 'a'}", "not JSON"),
        ('{"group": "a"', "not JSON"),
        ("", "not JSON: the line is empty"),
        ("[1, 2]", r"\[1, 2\] is not an object"),
        ("null", "null is not an object"),
        ("9" * 5000, "not JSON"),
        ("[" * 100000, "not JSON"),
    ],
    ids=lambda text: text[:20],
)
def test_a_line_that_is_no_object_is_refused(tmp_path, line, problem):
    with pytest.raises(UserError, match=f"line 2: {problem}") as raised:
        read(tmp_path / "rows", GOOD, line, GOOD)
    assert len(raised.value.problems) == 1


def test_a_line_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "rows").write_bytes(b'{"group": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: not JSON: the line is not UTF-8 text"):
        read_rollouts(tmp_path / "rows", VOCABULARY, False)


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path, text):
    (tmp_path / "rows").write_text(text)
    with pytest.raises(UserError, match="the file is empty"):
        read_rollouts(tmp_path / "rows", VOCABULARY, False)


def test_problems_are_listed_together_and_not_by_the_thousand(tmp_path):
    with pytest.raises(UserError) as raised:
        read(tmp_path / "rows", {"group": 1.5, "reward": "x"}, *[[]] * 30)
    problems = raised.value.problems
    assert len(problems) == 21
    assert sum("line 1: " in problem for problem in problems) == 5  # one a field
    assert problems[-1].endswith("15 more problems")


def test_masks_of_any_number_type_and_numbered_groups_are_read(tmp_path):
    rows = read(tmp_path / "rows", *[GOOD | {"group": 7, "loss_mask": mask} for mask in ([1, 0, 1], [1.0, 0.0, 1.0])])
    rows += read(tmp_path / "rows", GOOD | {"group": "7", "loss_mask": [True, False, True]})
    assert [row.loss_mask.tolist() for row in rows] == [[1, 0, 1]] * 3
    assert {row.group for row in rows} == {"7"}


def test_rollout_log_probs_are_read_only_where_they_are_needed(tmp_path):
    file = tmp_path / "rows"
    with pytest.raises(
        UserError, match='line 1: rollout_log_probs = "not read unless needed": Expected array, got str'
    ):
        read(file, GOOD, needs=True)
    with pytest.raises(UserError, match=r"rollout_log_probs: the field is missing.*truncated_importance"):
        read(file, {name: GOOD[name] for name in GOOD if name != "rollout_log_probs"}, needs=True)
    [row] = read(file, GOOD | {"rollout_log_probs": [-1, -2, -3]}, needs=True)
    assert row.rollout_log_probs.tolist() == [-1, -2, -3]


def rows_of(tmp_path: Path, *rewards_of_groups: tuple[str, float]) -> list[Rollout]:
    return read(tmp_path / "rows", *[GOOD | {"group": group, "reward": reward} for group, reward in rewards_of_groups])


def test_rows_become_mini_batches_of_whole_groups_in_order_of_their_first_rows(tmp_path):
    rows = rows_of(tmp_path, ("b", 1), ("a", 3), ("c", 5), ("b", 0), ("a", 3))
    first, second = replay_batches(rows, 2, LossConfig(), 100)
    assert (first.rows, second.rows) == ([0, 3, 1, 4], [2])
    assert [sequence.first_slot for sequence in first.sequences] == [0, 3, 6, 9]
    half = 0.5**0.5
    assert [s.advantage for s in first.sequences] == pytest.approx([half, -half, 0, 0], rel=1e-5)
    assert second.sequences[0].advantage == 0  # alone in its group
    assert first.num_trained_tokens == 8
    assert [len(batch.rows) for batch in replay_batches(rows, None, LossConfig(), 100)] == [5]


def test_equal_reward_groups_are_masked_where_the_loss_says_so(tmp_path):
    rows = rows_of(tmp_path, ("a", 1), ("a", 1), ("b", 1), ("b", 2))
    [batch] = replay_batches(rows, None, LossConfig(equal_reward_groups="mask"), 100)
    assert [sequence.num_trained_tokens for sequence in batch.sequences] == [0, 0, 2, 2]
    assert rows[0].loss_mask.any()


def test_rows_reach_the_ranks_as_they_are(tmp_path):
    rows = ReplayRows(rollouts=rows_of(tmp_path, ("a", 0.1), ("b", 2)), groups_per_batch=None, updates=3)
    received = decode(ReplayRows, encode(rows))
    assert (received.groups_per_batch, received.updates) == (None, 3)
    for sent, got in zip(rows.rollouts, received.rollouts, strict=True):
        for field in Rollout.__struct_fields__:
            np.testing.assert_array_equal(getattr(got, field), getattr(sent, field))
