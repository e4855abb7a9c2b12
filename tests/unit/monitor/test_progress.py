"""The progress display: from the run's files to figures and lines."""

import io
import math
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

from minpro_megatron.fleet import server_status
from minpro_megatron.monitor.history import Entry, encode_entry
from minpro_megatron.monitor.progress import Progress, TrainingState, duration, sparkline
from minpro_megatron.monitor.status import read_statuses, write_status
from tests.support.run_examples import example_config

ROLES = ("serve", "collect", "train")


def step_entry(step: int, **metrics: float) -> Entry:
    given = {name.replace("__", "/"): value for name, value in metrics.items()}
    return Entry(step, 100.0 + 2 * step, {"reward/accuracy": 0.1 * step, "reward/mean": 0.2 * step - 1} | given)


def test_figures_follow_the_entries():
    state = TrainingState(num_global_steps=10)
    assert (state.figures(), state.time_left) == ({}, "")
    state.add(Entry(0, 99.0, {"eval/pass_at_1": 0.125}))
    for step in range(4):
        state.add(
            step_entry(step, time__step_s=3.0, staleness__max=min(step, 2), throughput__response_tokens_per_s=1234.5)
        )
    state.add(Entry(4, 110.0, {"eval/pass_at_1": 0.25}))
    assert state.steps_done == 4
    assert state.figures() == {
        "reward": "-0.400",
        "accuracy": "30.0 %",
        "pass@1": "12.5 % -> 25.0 %",
        "staleness": "2",
        "tokens/s": "1,234",
        "s/step": "3.0",
    }
    assert state.time_left == "18 s left"


def test_without_step_times_the_clock_between_steps_counts():
    state = TrainingState(num_global_steps=10)
    state.add(step_entry(0))
    assert math.isnan(state.seconds_per_step)
    state.add(step_entry(1))
    assert state.seconds_per_step == 2.0
    assert state.seconds_left == 16.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (192, "3 min 12 s"), (3599.7, "1 h 00 min"), (7380, "2 h 03 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_sparkline_shows_the_shape():
    assert sparkline([0.0, 1.0], 10) == "▁█"
    assert sparkline([1.0, 1.0, math.nan], 10) == "▁▁"
    assert sparkline([math.nan], 10) == ""
    assert len(sparkline(list(range(1000)), 60)) == 60


def test_statuses_survive_a_damaged_file(tmp_path):
    assert read_statuses(tmp_path) == {}
    write_status(tmp_path, "serve", "starting 1 server")
    write_status(tmp_path, "serve", "serving")
    (tmp_path / "status" / "train.json").write_text('{"phase": "loa')
    (tmp_path / "status" / "collect.json").write_text("[]")
    statuses = read_statuses(tmp_path)
    assert list(statuses) == ["serve"]
    assert statuses["serve"].phase == "serving"
    assert abs(statuses["serve"].time - time.time()) < 5


def shown(config, *, terminal: bool, steps: int) -> str:
    """What the display has printed after `steps` steps that came one by one."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    output = io.StringIO()
    with Progress(config, ROLES, Console(file=output, force_terminal=terminal, width=90)) as progress:
        write_status(config.run_dir, "serve", "starting [1] server")
        progress.tick()
        for step in range(steps):
            with (config.run_dir / "metrics.jsonl").open("a") as file:
                file.write(encode_entry(step_entry(step, time__step_s=1.0)))
            progress._next_refresh = 0.0
            progress.tick()
    return output.getvalue()


def test_without_a_terminal_it_prints_a_line_every_ten_steps(tmp_path):
    lines = shown(example_config(tmp_path, num_global_steps=25), terminal=False, steps=25).splitlines()
    assert "serve: starting [1] server" in lines[0]
    counted = [line.split("step ")[1].split()[0] for line in lines[1:]]
    assert counted == ["1/25", "11/25", "21/25", "25/25"]
    assert "\x1b" not in "".join(lines)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_resumed_run_waits_for_its_first_step_and_shows_no_older_one(tmp_path, terminal):
    config = example_config(tmp_path, num_global_steps=25)
    shown(config, terminal=terminal, steps=12)
    output = io.StringIO()
    with Progress(config, ROLES, Console(file=output, force_terminal=terminal, width=100)) as progress:
        write_status(config.run_dir, "train", "loading the checkpoint")
        progress.tick()
        waiting = output.getvalue()
        assert "resuming: earlier starts trained 12 global steps; waiting for the first one of this start" in waiting
        assert "loading the checkpoint" in waiting
        assert "/25" not in waiting
        with (config.run_dir / "metrics.jsonl").open("a") as file:
            file.write(encode_entry(step_entry(10, time__step_s=3.0)))  # the last checkpoint is after step 9
        progress._next_refresh = 0.0
        progress.tick()
    after = output.getvalue()[len(waiting) :]
    assert "step 11/25" in after
    assert "42 s left" in after  # 14 steps of 3 s: the times of earlier starts do not count
    assert "resuming" not in after


def test_on_a_terminal_it_shows_phases_and_then_a_bar(tmp_path):
    output = shown(example_config(tmp_path, num_global_steps=25), terminal=True, steps=3)
    assert "starting [1] server" in output
    assert "step 3/25" in output
    assert "━" in output


@pytest.mark.parametrize("terminal", [True, False])
def test_it_says_while_it_trains_that_no_server_answers(tmp_path, monkeypatch, terminal):
    config, clock = example_config(tmp_path, num_global_steps=25), [100.0]
    monkeypatch.setattr(server_status, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    servers, output = server_status.ServerStatus(config.run_dir), io.StringIO()
    with Progress(config, ROLES, Console(file=output, force_terminal=terminal, width=120)) as progress:

        def pass_time(seconds: float, number: int) -> str:
            before = len(output.getvalue())
            for _ in range(round(seconds)):
                clock[0] += 1
                servers.tick(number)
            progress._next_refresh = 0.0
            progress.tick()
            return output.getvalue()[before:]

        config.run_dir.mkdir(parents=True)
        (config.run_dir / "metrics.jsonl").write_text(encode_entry(step_entry(0, time__step_s=1.0)))
        assert "server" not in pass_time(50, 2)
        assert "no server" not in pass_time(50, 0)
        assert "no server has answered for 2 min: nothing is sampled; see the log of serve" in pass_time(80, 0)
        back = pass_time(5, 1)
        assert "no server" not in back
        assert ("servers: 1 server again" in back) == (not terminal)
        assert "server" not in pass_time(50, 2)


def test_a_display_that_fails_does_not_end_the_run(tmp_path, capsys, monkeypatch):
    def fail(_run_dir):
        raise OSError("no such device")

    monkeypatch.setattr("minpro_megatron.monitor.progress.read_statuses", fail)
    with Progress(example_config(tmp_path), ROLES, Console(file=io.StringIO())) as progress:
        progress.tick()
        progress.tick()
    assert capsys.readouterr().err == "warning: the progress display stopped: OSError: no such device\n"
