"""Each alarm speaks on a series that goes wrong in its way, says so once, and is silent on healthy ones."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pytest

from minpro_megatron.config.alarms import AlarmName, AlarmsConfig
from minpro_megatron.config.run import with_overrides
from minpro_megatron.metrics.declared import METRICS
from minpro_megatron.monitor.alarms import CHECKS, WATCHED, AlarmWatch, Limits
from tests.support.run_examples import example_config

STEPS = 60
BOUND = 4


def healthy(num_steps: int = STEPS, seed: int = 0) -> dict[str, list[float]]:
    """A run that learns: rewards rise and entropy falls, both with noise; one gradient in forty is a thousand times
    too large, as it happens."""
    random, place = np.random.default_rng(seed), np.arange(num_steps)
    norms = np.exp(random.normal(0, 0.3, num_steps))
    norms[39::40] = 1000
    return {
        "reward/mean": list(0.3 + 0.5 * place / num_steps + random.normal(0, 0.03, num_steps)),
        "reward/min": [0.0] * num_steps,
        "reward/max": [1.0] * num_steps,
        "reward/equal_groups": list(random.uniform(0, 0.9, num_steps)),
        "reward/grader_failed": list(np.arange(num_steps) // 20.0),
        "reward/grader_timed_out": [0.0] * num_steps,
        "policy/entropy": list(0.9 - 0.6 * place / num_steps + random.normal(0, 0.02, num_steps)),
        "optimizer/grad_norm": list(norms),
        "objective/loss": list(random.normal(0, 1, num_steps)),
        "ratio/mean": list(1 + random.normal(0, 0.01, num_steps)),
        "objective/effective_sample_size": list(0.9 + random.normal(0, 0.03, num_steps)),
        "mismatch/kl_k3": list(np.exp(random.normal(-7, 0.5, num_steps))),
        "staleness/mean": list(np.minimum(place, 3) + random.uniform(0, 0.5, num_steps)),
        "overlap/trainer_wait_share": [0.25] * num_steps,
        "publish/fallbacks": [0.0] * num_steps,
        "fleet/members": [8.0] * num_steps,
        "fleet/restarts": [0.0] * num_steps,
    }


def watched(
    series: Mapping[str, Sequence[float]], settings: AlarmsConfig | None = None, bound: int | None = BOUND
) -> list[tuple[int, str, str]]:
    watch = AlarmWatch(Limits(settings or AlarmsConfig(), bound))
    found = []
    for step in range(len(next(iter(series.values())))):
        metrics = {name: values[step] for name, values in series.items()}
        found += [(alarm.step, alarm.name, str(alarm)) for alarm in watch.add(step, metrics)]
    assert sum(watch.num_raised.values()) == len(found)
    return found


def changed(name: str, first: int, values: float | Sequence[float]) -> dict[str, list[float]]:
    series = healthy()
    given = [values] * (STEPS - first) if isinstance(values, int | float) else values
    series[name][first : first + len(given)] = given
    return series


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_silent(seed: int) -> None:
    assert watched(healthy(200, seed)) == []


@pytest.mark.parametrize(
    ("series", "name", "step", "said"),
    [
        # the mean of 10 steps passes the threshold some steps after the figure itself
        (changed("policy/entropy", 40, 0.001), "entropy_collapse", 49, "0.001 nats is below"),
        (changed("policy/entropy", 40, 2.0), "entropy_explosion", 47, "alarms.entropy_explosion_factor = 3 times"),
        (changed("reward/mean", 40, 0.2), "reward_drop", 44, "below its peak of 0.58"),
        (
            changed("reward/equal_groups", 40, 1.0),
            "no_gradient",
            49,
            "in each of 10 steps at least 100 % of the groups had",
        ),
        (changed("reward/grader_failed", 40, 13.0), "failed_grades", 40, "12 responses of the last 10 steps could not"),
        (changed("reward/grader_timed_out", 40, 10.0), "failed_grades", 40, "exceeded its time for 10"),
        (changed("optimizer/grad_norm", 20, [50.0, 1.0, 50.0, 1.0, 50.0]), "gradient_spikes", 24, "in 3 of the last"),
        (changed("objective/effective_sample_size", 40, 0.1), "effective_sample_size", 47, "is below"),
        (changed("mismatch/kl_k3", 40, 0.5), "mismatch", 40, "nats is above alarms.mismatch_kl_nats = 0.02"),
        (changed("staleness/mean", 20, 3.9), "staleness_at_bound", 29, "the trainer waited for 25 % of its time"),
        (changed("publish/fallbacks", 20, 1.0), "transport", 20, "from disk because publish.transport had failed"),
        (changed("fleet/members", 20, 6.0), "server_loss", 20, "6 servers respond, 2 fewer than before"),
        (changed("fleet/restarts", 20, 1.0), "server_loss", 20, "1 servers returned"),
        (changed("objective/loss", 20, [math.nan]), "not_finite", 20, "objective/loss: not finite"),
        (changed("optimizer/grad_norm", 20, [math.inf]), "not_finite", 20, "optimizer/grad_norm: not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) and value in CHECKS else "",
)
def test_what_goes_wrong_is_said_once(series: dict, name: str, step: int, said: str) -> None:
    ((found_step, found_name, text),) = watched(series)
    assert (found_name, found_step) == (name, step)
    assert said in text
    assert next(watched for one, watched in CHECKS.items() if one == name).remedy in text


@pytest.mark.parametrize(
    ("series", "threshold"),
    [
        (changed("policy/entropy", 40, 0.001), {"entropy_collapse_nats": None}),
        (changed("policy/entropy", 40, 2.0), {"entropy_explosion_factor": 9.0}),
        (changed("reward/mean", 40, 0.2), {"reward_drop": 0.9}),
        (changed("reward/equal_groups", 40, 1.0), {"equal_groups": None}),
        (changed("reward/grader_failed", 40, 13.0), {"failed_grades": 20}),
        (changed("optimizer/grad_norm", 20, [50.0] * 3), {"gradient_spike_factor": None}),
        (changed("objective/effective_sample_size", 40, 0.1), {"effective_sample_size": 0.05}),
        (changed("mismatch/kl_k3", 40, 0.5), {"mismatch_kl_nats": 1.0}),
        (changed("staleness/mean", 20, 3.9), {"staleness_share_of_bound": 1.0}),
        (changed("fleet/members", 20, 6.0), {"lost_servers": 3}),
    ],
)
def test_another_threshold_or_none_makes_it_silent(series: dict, threshold: dict[str, Any]) -> None:
    assert watched(series) != []
    assert watched(series, AlarmsConfig(**threshold)) == []


@pytest.mark.parametrize(("window", "spikes"), [(2, [50.0] * 2), (3, [50.0] * 3), (10, [50.0] * 3)])
def test_gradients_spike_in_windows_of_any_length(window: int, spikes: list[float]) -> None:
    settings = AlarmsConfig(window_steps=window)
    last = 20 + len(spikes) - 1
    assert [found[:2] for found in watched(changed("optimizer/grad_norm", 20, spikes), settings)] == [
        (last, "gradient_spikes")
    ]
    assert watched(changed("optimizer/grad_norm", 20, spikes[1:]), settings) == []


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (2.0, -1.0), (100.0, -1000.0), (0.01, 7.0)])
def test_a_fall_of_the_reward_is_seen_on_every_scale(scale: float, offset: float) -> None:
    """Of rewards of 0 and 1, of -1 and +1, and of a grader that never gives a right response's reward."""
    series = changed("reward/mean", 40, 0.2)
    for name in ("reward/mean", "reward/min", "reward/max"):
        series[name] = [scale * value + offset for value in series[name]]
    assert [found[:2] for found in watched(series)] == [(44, "reward_drop")]
    assert watched(series, AlarmsConfig(reward_drop=0.9)) == []


def test_failed_grades_are_counted_across_a_restart_of_the_collector() -> None:
    counts = {"reward/grader_failed": [4.0] * 12 + [8.0] + [0.0, 5.0] + [5.0] * 9 + [14.0]}
    assert [step for step, *_ in watched(counts)] == []
    assert [found[:2] for found in watched(counts, AlarmsConfig(failed_grades=9))] == [(14, "failed_grades")]


def test_what_goes_on_is_not_news_and_what_comes_back_is() -> None:
    lost = {"fleet/members": [4.0] * 5 + [3.0] * 30 + [4.0] * 12 + [3.0, 4.0, 3.0] + [4.0] * 20}
    assert [step for step, *_ in watched(lost)] == [5, 47]


def test_staleness_in_delay_mode_is_as_set() -> None:
    assert watched(changed("staleness/mean", 20, 3.9), bound=None) == []


def test_nothing_is_averaged_before_there_is_a_window() -> None:
    empty = {"policy/entropy": [0.0] * 9, "reward/accuracy": [0.9, 0.0] * 4 + [0.9]}
    assert watched(empty) == []
    assert [found[1] for found in watched({"policy/entropy": [0.0] * 10})] == ["entropy_collapse"]
    # steps that have no such metric (no trained token) do not count
    assert watched({"policy/entropy": [math.nan if step % 2 else 0.0 for step in range(18)]})[0][1] == "not_finite"


def test_a_server_that_starts_again_with_its_counter_is_no_loss() -> None:
    assert watched({"fleet/members": [2.0] * 4, "fleet/restarts": [5.0, 5.0, 0.0, 0.0]}) == []


def test_a_run_without_servers_or_gradients_is_silent() -> None:
    assert watched({"reward/accuracy": [0.0] * STEPS, "optimizer/grad_norm": [0.0] * STEPS}) == []


def test_every_alarm_has_a_check_and_looks_at_declared_metrics() -> None:
    assert set(CHECKS) == set(get_args(AlarmName))
    assert set(WATCHED) <= set(METRICS)


def test_settings_name_alarms_that_exist(tmp_path) -> None:
    config = example_config(tmp_path)
    stopping = with_overrides(config, ['alarms.stop_on=["mismatch"]', "alarms.reward_drop=null"])
    assert (stopping.alarms.stop_on, stopping.alarms.reward_drop) == (["mismatch"], None)
    with pytest.raises(ValueError, match=r"alarms\.stop_on"):
        with_overrides(config, ['alarms.stop_on=["msmatch"]'])
    with pytest.raises(ValueError, match=r"alarms\.stop_on to \[\]"):
        with_overrides(stopping, ["model.routing_replay=scored", "checkpoint.every_steps=0"])


CANARY = "publish/canary_server_max"


@pytest.mark.parametrize(
    ("values", "settings", "raised"),
    [
        ([0.01, 0.02, 0.09, 0.09], {}, []),
        ([0.01, 0.02, 0.11, 0.12], {}, [(2, "0.11 nats is above alarms.canary_nats = 0.1")]),
        ([0.2, 0.3, 0.5, 0.61], {}, [(0, "0.2 nats is above alarms.canary_nats"), (3, "3 times that of the first")]),
        ([0.2, 0.3, 0.5, 0.61], {"canary_factor": 4.0}, [(0, "0.2 nats is above")]),
        ([0.2, 0.3, 0.5, 0.61], {"canary_nats": None}, []),
    ],
)
def test_a_canary_is_compared_with_what_the_first_publication_showed(
    values: list[float], settings: dict, raised: list[tuple[int, str]]
) -> None:
    found = watched({CANARY: values}, AlarmsConfig.model_validate({"window_steps": 2} | settings))
    assert [(step, name) for step, name, _ in found] == [(step, "canary") for step, _ in raised]
    for (_, _, text), (_, said) in zip(found, raised, strict=True):
        assert said in text
