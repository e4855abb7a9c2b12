"""When the run saves and when a start ends early: by steps, by time, before a time limit, when a stop is requested."""

from pathlib import Path

import pytest

from minpro_megatron.checkpoints.save_schedule import Decision, SaveSchedule
from minpro_megatron.config.run import RunConfig, with_overrides
from tests.support.run_examples import example_config

GO_ON, SAVE = Decision(save=False), Decision(save=True)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def config_of(folder: Path, *changes: str, steps: int = 20) -> RunConfig:
    config = example_config(folder)
    return with_overrides(config, [f"num_global_steps={steps}", "evaluation.every_steps=0", *changes])


def decisions(schedule: SaveSchedule, clock: Clock, seconds: list[float]) -> list[Decision]:
    """After each of the steps that take so many seconds."""
    found = []
    schedule.begin()
    for version, step_s in enumerate(seconds, start=1):
        clock.now += step_s
        found.append(schedule.after_step(version))
    return found


def saves(found: list[Decision]) -> list[int]:
    assert not any(one.end for one in found)
    return [version for version, one in enumerate(found, start=1) if one.save]


@pytest.mark.parametrize(
    ("changes", "steps", "expected"),
    [
        (("checkpoint.every_steps=3",), 8, [3, 6, 8]),
        (("checkpoint.every_steps=3", "checkpoint.at_end=false"), 8, [3, 6]),
        (("checkpoint.every_steps=4",), 8, [4, 8]),
        (("checkpoint.every_steps=4", "checkpoint.at_end=false"), 8, [4, 8]),
        (("checkpoint.every_steps=0",), 8, [8]),
        (("checkpoint.every_steps=0", "checkpoint.at_end=false"), 8, []),
        # 60 s a step: every 2.5 minutes is after every third step
        (("checkpoint.every_steps=0", "checkpoint.every_minutes=2.5", "checkpoint.at_end=false"), 8, [3, 6]),
        # the save after step 4 is young enough until step 7
        (("checkpoint.every_steps=4", "checkpoint.every_minutes=3"), 8, [3, 4, 7, 8]),
    ],
)
def test_a_run_saves_by_steps_and_by_time_and_at_its_end(
    tmp_path: Path, changes: tuple[str, ...], steps: int, expected: list[int]
) -> None:
    clock = Clock()
    schedule = SaveSchedule(config_of(tmp_path, *changes, steps=steps), clock=clock)
    assert saves(decisions(schedule, clock, [60.0] * steps)) == expected


def test_the_last_step_that_fits_before_the_time_limit_is_saved(tmp_path: Path) -> None:
    """Steps of 100 s and a checkpoint of 40 s: 1.25 x 140 = 175 s must be left for another one."""
    clock = Clock()
    schedule = SaveSchedule(config_of(tmp_path), save_by=clock.now + 680, clock=clock)
    schedule.saved(40.0)
    found = decisions(schedule, clock, [100.0] * 6)
    assert found[:5] == [GO_ON] * 5
    assert found[5].save
    assert found[5].end == (
        "the time limit leaves 80 s, and another global step may take 100 s and its checkpoint 40 s"
    )
    at_once = SaveSchedule(config_of(tmp_path), save_by=clock.now + 175 + 100, clock=clock)
    at_once.saved(40.0)
    assert decisions(at_once, clock, [100.0]) == [GO_ON]  # 175 s are left


def test_the_slowest_recent_step_and_save_count(tmp_path: Path) -> None:
    clock = Clock()
    schedule = SaveSchedule(config_of(tmp_path), save_by=clock.now + 900, clock=clock)
    for seconds in (10.0, 200.0, 20.0):
        schedule.saved(seconds)
    assert decisions(schedule, clock, [10.0, 300.0])[1].end.endswith("may take 300 s and its checkpoint 200 s")


def test_a_checkpoint_that_was_never_measured_is_expected_to_take_a_step(tmp_path: Path) -> None:
    clock = Clock()
    schedule = SaveSchedule(config_of(tmp_path), save_by=clock.now + 340, clock=clock)
    found = decisions(schedule, clock, [100.0])  # 240 s are left, 250 s are needed
    assert found[0].end.endswith("another global step may take 100 s and its checkpoint 100 s")


def test_steps_that_wait_for_an_evaluation_are_expected_to_be_long(tmp_path: Path) -> None:
    """Version 0 is evaluated during step 0, version 4 during step 4; the steps between them take a tenth."""
    clock = Clock()
    config = config_of(tmp_path, "evaluation.every_steps=4")
    schedule = SaveSchedule(config, save_by=clock.now + 2400, clock=clock)
    schedule.saved(10.0)
    found = decisions(schedule, clock, [1000.0, 100.0, 100.0, 100.0])
    assert found[:3] == [GO_ON] * 3
    assert "another global step may take 1000 s" in found[3].end


def test_a_run_that_saves_nothing_does_not_end_early(tmp_path: Path) -> None:
    clock = Clock()
    config = config_of(tmp_path, "checkpoint.every_steps=0")
    schedule = SaveSchedule(config, save_by=clock.now, stop_request=lambda: "told to stop by SIGTERM", clock=clock)
    assert decisions(schedule, clock, [10.0, 10.0]) == [GO_ON] * 2


def test_a_request_to_stop_saves_and_ends(tmp_path: Path) -> None:
    clock, requests = Clock(), iter([None, "told to stop by SIGTERM"])
    schedule = SaveSchedule(config_of(tmp_path), stop_request=lambda: next(requests), clock=clock)
    assert decisions(schedule, clock, [1.0, 1.0]) == [GO_ON, Decision(save=True, end="told to stop by SIGTERM")]


def test_the_runs_end_is_no_early_end(tmp_path: Path) -> None:
    clock = Clock()
    config = config_of(tmp_path, steps=1)
    schedule = SaveSchedule(config, save_by=clock.now, stop_request=lambda: "told to stop by SIGTERM", clock=clock)
    assert decisions(schedule, clock, [10.0]) == [SAVE]


@pytest.mark.parametrize("setting", ["time_limit_minutes=5", "save_on_stop_s=5"])
def test_limits_without_checkpoints_are_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(ValueError, match=r"checkpoint: .* has no effect while every_steps = 0 and every_minutes = 0"):
        config_of(tmp_path, "checkpoint.every_steps=0", f"checkpoint.{setting}")
    by_time = config_of(tmp_path, "checkpoint.every_minutes=9", "checkpoint.every_steps=0", f"checkpoint.{setting}")
    assert by_time.checkpoint.saves_before_end
