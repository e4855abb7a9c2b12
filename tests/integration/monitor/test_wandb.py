"""Weights & Biases gets a run's metrics, continues one run when it resumes, and never ends a run. Offline, for real."""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.monitor import wandb_board
from minpro_megatron.monitor.history import read_history
from minpro_megatron.monitor.wandb_board import FOLDER, WandbBoard
from minpro_megatron.monitor.writer import RunWriter
from tests.support.run_examples import example_config
from tests.support.wandb_files import stored_history, stored_run

wandb = pytest.importorskip("wandb", reason="the optional package wandb is not installed")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunConfig]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    yield with_overrides(example_config(tmp_path), ["wandb.enabled=true", "wandb.project=calculators"])
    wandb.teardown()  # it reads its environment once per process


def stored_starts(config: RunConfig) -> list[Path]:
    return sorted((config.run_dir / FOLDER).glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def test_a_resumed_run_continues_the_same_run_with_its_settings_and_metrics(config: RunConfig) -> None:
    with RunWriter(config.run_dir, None, [WandbBoard(config)]) as writer:
        writer.scalars(0, {"eval/pass_at_1": 0.25})
        writer.scalars(0, {"reward/mean": 0.5, "ratio/max": 2.0})
        writer.counts(0, "ratio/log", np.array([0, 2, 1, 0]), np.array([-2.0, -1.0, 0.0, 1.0, 2.0]))
        writer.histogram(0, "response/length", np.array([3, 3, 4]))
        writer.text(0, "samples", "a prompt and its response")
    time.sleep(1.0)  # the package names a folder by the second of the start
    with RunWriter(config.run_dir, 1, [WandbBoard(config)]) as writer:
        writer.scalars(1, {"reward/mean": 0.75})

    first, second = stored_starts(config)
    runs = [stored_run(path) for path in (first, second)]
    assert runs[0].run_id == runs[1].run_id
    assert {(run.display_name, run.project) for run in runs} == {("example", "calculators")}
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["objective"] == config.objective.model_dump()
    assert settings["staleness"]["delay_steps"] == config.staleness.delay_steps
    evaluation, step, ratios, lengths = stored_history(first)
    assert evaluation == {"policy_version": 0, "eval/pass_at_1": 0.25}
    assert {name: step[name] for name in ("global_step", "reward/mean", "ratio/max")} == {
        "global_step": 0, "reward/mean": 0.5, "ratio/max": 2.0,
    }  # fmt: skip
    assert (ratios["ratio/log_histogram/values"], ratios["ratio/log_histogram/bins"]) == ([2, 1], [-1, 0, 1])
    assert sum(lengths["response/length_histogram/values"]) == 3
    assert stored_history(second) == [{"global_step": 1, "reward/mean": 0.75}]
    assert b"a prompt and its response" not in first.read_bytes()


def test_a_failure_in_the_middle_is_logged_once_and_the_run_goes_on(
    config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    board = WandbBoard(config)
    with RunWriter(config.run_dir, None, [board]) as writer:
        writer.scalars(0, {"reward/mean": 0.5})
        board._run.finish()  # from now on the package refuses what it is given
        for step in (1, 2):
            writer.scalars(step, {"reward/mean": 0.5})
            writer.histogram(step, "response/length", np.array([3]))
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert "the run continues without it" in warning.getMessage()
    assert [entry.step for entry in read_history(config.run_dir)] == [0, 1, 2]


def test_a_server_that_does_not_answer_does_not_stop_the_run(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_board, "_START_LIMIT_S", 1.0)
    with RunWriter(config.run_dir, None, [WandbBoard(config)]) as writer:
        writer.scalars(0, {"reward/mean": 0.5})
    assert sum("the run continues without it" in record.getMessage() for record in caplog.records) == 1
    assert [entry.step for entry in read_history(config.run_dir)] == [0]
