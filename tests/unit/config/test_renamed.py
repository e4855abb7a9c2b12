"""Settings under their old names: in overrides, in run.json and in recipes; and the line that gives the new name."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from minpro_megatron.config import renamed
from minpro_megatron.config.collector import CollectorConfig
from minpro_megatron.config.reward import RewardConfig
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.errors import UserError
from tests.support.run_examples import example_config

OLD = {"reward": "math", "reward_by_source": {"s": "dapo"}, "right_reward": 2.0, "reward_timeout_s": 7.0}
OLD |= {"reward_workers": 3}
NEW = RewardConfig(function="math", by_source={"s": "dapo"}, right_reward=2.0, timeout_s=7.0, workers=3)


@pytest.fixture(autouse=True)
def _announced_by_no_other_test() -> Iterator[None]:
    renamed._announce.cache_clear()
    yield
    renamed._announce.cache_clear()


def test_overrides_under_old_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = [f"collector.{name}={json.dumps(value)}" for name, value in OLD.items()]
    config = with_overrides(example_config(tmp_path), ["collector.port=7", *overrides, *overrides])
    assert (config.reward, config.collector) == (NEW, CollectorConfig(port=7))
    assert caplog.record_tuples == [
        (renamed.__name__, logging.WARNING, f"renamed settings (the old names still work): {old} is now {new}")
        for old, new in renamed._NEW_NAMES.items()
    ]


def test_an_entry_of_a_renamed_mapping(tmp_path: Path) -> None:
    config = with_overrides(example_config(tmp_path, reward=NEW), ["collector.reward_by_source.s=calculator"])
    assert config.reward.by_source == {"s": "calculator"}


def test_a_run_json_under_old_names_is_written_under_the_new_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = json.loads(example_config(tmp_path).to_json())
    del values["reward"]
    values["collector"] |= OLD
    config = RunConfig.from_json(json.dumps(values))
    assert config == example_config(tmp_path, reward=NEW)
    (line,) = caplog.messages
    assert all(f"{old} is now {new}" in line for old, new in renamed._NEW_NAMES.items())
    assert not json.loads(config.to_json())["collector"].keys() & OLD.keys()


def test_a_recipe_that_constructs_the_collector_with_old_names(tmp_path: Path) -> None:
    config = example_config(tmp_path, collector=CollectorConfig(host="::1", **OLD))
    assert config == example_config(tmp_path, reward=NEW, collector=CollectorConfig(host="::1"))
    copied = example_config(tmp_path, reward=RewardConfig(function="dapo", timeout_s=7.0))
    changed = copied.collector.model_copy(update={"reward": "math", "port": 9})
    copied = copied.model_copy(update={"collector": changed})
    config = with_overrides(copied, [])  # a recipe's result is always passed through this
    assert (config.reward, config.collector) == (
        RewardConfig(function="math", timeout_s=7.0),
        CollectorConfig(port=9),
    )


@pytest.mark.parametrize(
    "collector", [CollectorConfig.model_validate({"reward": "math"}), {"reward": "math"}], ids=["section", "values"]
)
def test_both_names_at_once_are_refused(tmp_path: Path, collector: object) -> None:
    with pytest.raises(ValueError, match=r"collector.reward and reward.function are two names of one setting; remove"):
        example_config(tmp_path, reward={"function": "dapo"}, collector=collector)


def test_a_value_that_the_field_refuses_is_reported_under_the_new_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reward.workers: .*greater than or equal to 1 \(got 0\)"):
        with_overrides(example_config(tmp_path), ["collector.reward_workers=0"])


def test_other_unknown_settings_of_the_collector_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no setting 'rewards'; known: host, port"):
        with_overrides(example_config(tmp_path), ["collector.rewards=math"])
    with pytest.raises(ValueError, match=r"rewards\n *Extra inputs are not permitted"):
        CollectorConfig.model_validate({"rewards": "math"})
