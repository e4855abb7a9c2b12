"""The contracts of the hooks for advantages and filters: the examples of docs/, and what each rule refuses."""

import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

from minpro_megatron.buffer.schedule import DelaySchedule
from minpro_megatron.collector.group_filter import GroupFilter
from minpro_megatron.config.hooked import hooks_of
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.hooks.hook import Hook, HookError
from minpro_megatron.objective.advantages import group_advantages
from minpro_megatron.records import CollectedGroup
from tests.support.rollout_fakes import collected, issued_groups, run_config

ADVANTAGE, FILTER = "docs.examples.advantage:shorter_is_better", "docs.examples.filter:teaches"
MODULE = "hooks_of_a_test"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the user's, whose function `hook` a test defines."""
    made = ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, made)
    return made


def with_filter(tmp_path: Path, path: str, *more: str) -> RunConfig:
    return with_overrides(run_config(tmp_path), [f"data.filter={path}", *more])


def group(rewards: list[float], finish_reasons: list[str] | None = None) -> CollectedGroup:
    made = collected(issued_groups([0])[0])
    response = made.responses[0]
    reasons = finish_reasons or ["stop"] * len(rewards)
    responses = [
        msgspec.structs.replace(response, reward=reward, finish_reason=reason)
        for reward, reason in zip(rewards, reasons, strict=True)
    ]
    return msgspec.structs.replace(made, responses=responses)


def test_the_advantage_of_the_example() -> None:
    found = group_advantages([1.0, 1.0, 0.0], ADVANTAGE, lengths=[100, 400, 100])
    mean = (0.9 + 0.6 - 0.1) / 3
    np.testing.assert_allclose(found, [0.9 - mean, 0.6 - mean, -0.1 - mean], rtol=1e-6)
    assert found.dtype == np.float32


def test_the_function_cannot_change_the_rewards(module: Any) -> None:
    def hook(rewards: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        rewards[:], lengths[:] = 7, 7
        return rewards

    module.hook = hook
    rewards, lengths = np.array([1.0, 0.0]), np.array([3, 4])
    assert group_advantages(rewards, f"{MODULE}:hook", lengths=lengths).tolist() == [7.0, 7.0]  # type: ignore[arg-type]
    assert (rewards.tolist(), lengths.tolist()) == ([1.0, 0.0], [3, 4])


@pytest.mark.parametrize(
    ("number", "result", "told"),
    [
        (0, None, r"it returned shape \(\) for 2 responses"),
        (1, [1.0], r"it returned shape \(1,\) for 2 responses; return one number each"),
        (2, [[1.0], [2.0]], r"it returned shape \(2, 1\) for 2 responses"),
        (3, [1.0, float("nan")], r"it returned \[1.0, nan\] for the rewards \[1.0, 0.0\]; all must be finite"),
        (4, ["one", "two"], "it must return numbers, one per response, not list"),
    ],
)
def test_a_wrong_advantage_is_one_line_with_the_hook(module: Any, number: int, result: object, told: str) -> None:
    setattr(module, f"hook_{number}", lambda rewards, lengths: result)
    with pytest.raises(HookError, match=told) as error:
        group_advantages([1.0, 0.0], f"{MODULE}:hook_{number}", lengths=[1, 2])
    assert str(error.value).startswith(f"loss.advantage = {MODULE}:hook_{number}: ")


def test_an_error_in_an_advantage_names_the_setting(module: Any) -> None:
    module.hook_5 = lambda rewards: rewards
    with pytest.raises(TypeError) as error:
        group_advantages([1.0, 0.0], f"{MODULE}:hook_5", lengths=[1, 2])
    assert f"of the setting loss.advantage = {MODULE}:hook_5" in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    ("rewards", "reasons", "kept"),
    [
        ([1.0, 0.0, 0.0, 0.0], None, True),
        ([1.0, 1.0, 1.0, 1.0], None, False),
        ([1.0, 0.0, 0.0, 0.0], ["stop", "length", "stop", "length"], True),
        ([1.0, 0.0, 0.0, 0.0], ["stop", "length", "length", "length"], False),
    ],
)
def test_the_filter_of_the_example(tmp_path: Path, rewards: list[float], reasons: list[str] | None, kept: bool) -> None:
    assert GroupFilter(with_filter(tmp_path, FILTER)).keeps(group(rewards, reasons)) is kept


def test_without_a_filter_equal_rewards_are_kept_unless_dynamic_sampling_drops_them(tmp_path: Path) -> None:
    equal = group([1.0, 1.0])
    assert GroupFilter(run_config(tmp_path)).keeps(equal)
    assert not GroupFilter(run_config(tmp_path, dynamic_sampling=True)).keeps(equal)
    assert not GroupFilter(run_config(tmp_path)).keeps(msgspec.structs.replace(equal, grading_problem="died"))


def test_a_filter_is_asked_only_about_groups_that_are_kept_otherwise(tmp_path: Path, module: Any) -> None:
    asked: list[CollectedGroup] = []
    module.hook = lambda group: asked.append(group) is None
    groups = GroupFilter(with_filter(tmp_path, f"{MODULE}:hook", "batch.dynamic_sampling=true"))
    assert not groups.keeps(group([1.0, 1.0]))
    assert not groups.keeps(msgspec.structs.replace(group([1.0, 0.0]), grading_problem="died"))
    assert groups.keeps(group([1.0, 0.0]))
    assert len(asked) == 1


@pytest.mark.parametrize("result", [None, 1, "yes", 0.0])
def test_a_filter_that_returns_no_bool_is_one_line(tmp_path: Path, module: Any, result: object) -> None:
    module.hook = lambda group: result
    kind = type(result).__name__
    told = f"data.filter = {MODULE}:hook: it must return True (keep the group) or False, not {kind}"
    with pytest.raises(HookError, match=re.escape(told)):
        GroupFilter(with_filter(tmp_path, f"{MODULE}:hook")).keeps(group([1.0, 0.0]))


def test_an_error_in_a_filter_names_the_setting(tmp_path: Path, module: Any) -> None:
    module.hook = lambda group: group.reward
    with pytest.raises(AttributeError) as error:
        GroupFilter(with_filter(tmp_path, f"{MODULE}:hook")).keeps(group([1.0, 0.0]))
    assert f"of the setting data.filter = {MODULE}:hook" in "".join(traceback.format_exception(error.value))


def test_more_groups_than_needed_are_sampled_where_a_filter_drops_some(tmp_path: Path) -> None:
    more = "batch.over_sampling=2"
    plain = DelaySchedule(with_overrides(run_config(tmp_path, delay=0), [more]))
    filtered = DelaySchedule(with_overrides(run_config(tmp_path, delay=0), [more, f"data.filter={FILTER}"]))
    assert len(filtered.to_issue()) == 2 * len(plain.to_issue())


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "loss.advantage=gae",
            "loss.advantage: there is no such advantage; known: group_normalized, group_mean, leave_",
        ),
        ("data.filter=all_equal", "data.filter: it must be the import path of your own function, such as package.modu"),
        (
            "objective.name=reinforce",
            "objective.name = 'reinforce': there is no such objective; known: minpro, cispo, grpo.*import path",
        ),
        ("objective.settings.x=1", "there is no section 'settings'"),
    ],
)
def test_what_is_no_import_path_is_one_line(tmp_path: Path, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        with_overrides(run_config(tmp_path), [override])


def test_the_hooks_of_a_run_are_known_by_their_settings(tmp_path: Path) -> None:
    assert hooks_of(run_config(tmp_path)) == []
    overrides = [f"loss.advantage={ADVANTAGE}", f"data.filter={FILTER}", "objective.name=my.module:objective"]
    overrides += ["objective.settings.scale=2", "reward.function=my.module:grade", "reward.by_source.s=my.module:two"]
    config = with_overrides(run_config(tmp_path), overrides)
    assert hooks_of(config) == [
        Hook("objective.name", "my.module:objective"),
        Hook("loss.advantage", ADVANTAGE),
        Hook("data.filter", FILTER),
        Hook("reward.function", "my.module:grade"),
        Hook("reward.by_source['s']", "my.module:two"),
    ]
    assert RunConfig.from_json(config.to_json()) == config
    assert config.objective.model_dump()["settings"] == {"scale": 2}
