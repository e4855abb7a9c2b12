"""A start's time limit, and what the launcher allows the trainer after a signal."""

from pathlib import Path

import pytest

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.launch.node_roles import NodePlace, node_commands
from minpro_megatron.launch.roles import role_commands
from minpro_megatron.launch.stopping import ENDING_S, LAST_SAVE_LIMIT_S, Stopping, save_by
from minpro_megatron.launch.topology import NodeShare, Topology
from minpro_megatron.run_folder.early_end import EarlyEnd, read_stop_request, write_early_end
from tests.support.run_examples import example_config

END = EarlyEnd(policy_version=3, reason="the time limit", saved=True)
SAVING = EarlyEnd(policy_version=3, reason="the time limit", saved=False)


def config_of(folder: Path, *changes: str) -> RunConfig:
    config = with_overrides(example_config(folder), [f"checkpoint.{change}" for change in changes])
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config


@pytest.mark.parametrize(
    ("minutes", "job_end", "end_early_s", "expected"),
    [
        (0, "", 0, None),
        (0, "10000", 0, 10000.0),
        (0, "10000", 300, 9700.0),
        (0, "Unknown", 300, None),
        (0, "0", 300, None),
        (5, "", 300, 1300.0),
        (5, "1200", 0, 1200.0),
        (5, "9000", 300, 1300.0),
    ],
)
def test_the_earliest_limit_counts(
    tmp_path: Path, minutes: int, job_end: str, end_early_s: float, expected: float | None
) -> None:
    environment = {"SLURM_JOB_END_TIME": job_end} if job_end else {}
    config = config_of(tmp_path, f"time_limit_minutes={minutes}")
    found = save_by(config, environment, 1000.0, end_early_s)
    assert found == (None if expected is None else expected - ENDING_S)


def test_the_trainer_gets_the_time_by_which_it_must_have_saved(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    place = NodePlace(index=0, address="10.0.0.1", interface="eth0", head_address="10.0.0.1", rendezvous_port=1)
    topology = Topology(nodes=(NodeShare(ranks=1, num_servers=1, collects=True),))
    for limit, options in ((1234.5, ["--save-by", "1234"]), (None, ["0"])):
        for made in (
            role_commands(config, Path("run.json"), 0, {}, limit),
            node_commands(config, Path("run.json"), 0, topology, place, {}, limit),
        ):
            by_role = {command.role: command.arguments for command in made}
            assert by_role["train"][-len(options) :] == options
            assert "--save-by" not in by_role["serve"] + by_role["collect"]


def test_without_a_setting_a_signal_ends_the_run_at_once(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert Stopping(config, 0).allowed_s("SIGINT") == 0
    assert read_stop_request(config.run_dir, 0) is None


NOW = 10_000.0
# Slurm's job ends 300 s after the signal; in a minute more than that; long after it; at a time that it does not say.
AT_LIMIT, BEFORE_LIMIT, LONG_BEFORE, NO_LIMIT = (
    {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": end} for end in ("10300", "10360", "10361", "0")
)


@pytest.mark.parametrize(
    ("changes", "end_early_s", "environment", "expected"),
    [
        (("save_on_stop_s=40",), 0, {}, 40),
        # Kubernetes
        ((), 300, {}, 240),
        (("save_on_stop_s=40",), 300, {}, 240),
        (("save_on_stop_s=400",), 300, {}, 300 - ENDING_S),
        ((), 30, {}, 0),
        (("every_steps=0",), 300, {}, 0),
        ((), 300, AT_LIMIT, 240),
        ((), 300, BEFORE_LIMIT, 300),
        # scancel: Slurm kills after KillWait, whatever time the limit would leave
        ((), 300, LONG_BEFORE, 0),
        ((), 300, NO_LIMIT, 0),
        ((), 0, AT_LIMIT, 0),
    ],
)
def test_the_trainer_is_asked_to_save_while_the_setting_or_the_job_leaves_time(
    tmp_path: Path,
    changes: tuple[str, ...],
    end_early_s: float,
    environment: dict[str, str],
    expected: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(tmp_path, *changes)
    assert Stopping(config, 2, end_early_s, environment, lambda: NOW).allowed_s("SIGTERM") == expected
    request = read_stop_request(config.run_dir, 2)
    assert (request.reason if request else "") == ("stopped by SIGTERM" if expected else "")
    said = capsys.readouterr().err
    assert said == (
        f"SIGTERM: the trainer finishes its global step and saves, for {expected:.0f} s at most; a second signal ends "
        "it at once\n"
        if expected
        else ""
    )


def test_what_slurm_may_cut_short_is_not_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The time that the setting allows may fit the cluster's GraceTime, which the job does not know."""
    config = config_of(tmp_path, "save_on_stop_s=400")
    assert Stopping(config, 0, 300, LONG_BEFORE, lambda: NOW).allowed_s("SIGTERM") == 400
    assert ", for 400 s at most, unless Slurm kills it before (30 s after scancel, or the" in capsys.readouterr().err
    write_early_end(config.run_dir, 0, SAVING)
    assert Stopping(config, 0, 300, LONG_BEFORE, lambda: NOW).allowed_s("SIGTERM") == LAST_SAVE_LIMIT_S
    assert ", unless Slurm kills it before " in capsys.readouterr().err
    assert Stopping(config, 0, 300, AT_LIMIT, lambda: NOW).allowed_s("SIGTERM") == 300 - ENDING_S
    assert "unless" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("signal_name", "environment", "clause"),
    [
        ("SIGTERM", NO_LIMIT, ", unless Slurm kills it before (30 s after scancel, or the cluster's KillWait)"),
        ("SIGTERM", {"SKYPILOT_TASK_ID": "sky-7"}, ", unless SkyPilot kills it before"),
        ("SIGTERM", {}, ""),
        ("SIGINT", NO_LIMIT, ""),  # Ctrl-C in an interactive job, after which nothing is killed
        ("SIGINT", {"SKYPILOT_TASK_ID": "sky-7"}, ""),
    ],
)
def test_who_may_kill_before_is_named_after_the_signal_that_announces_it(
    signal_name: str,
    environment: dict[str, str],
    clause: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = config_of(tmp_path, "save_on_stop_s=400")
    assert Stopping(config, 0, 0, environment, lambda: NOW).allowed_s(signal_name) == 400
    assert f"saves, for 400 s at most{clause}; a second signal" in capsys.readouterr().err


def test_a_last_checkpoint_under_way_is_finished(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    write_early_end(config.run_dir, 0, SAVING)
    stopping = Stopping(config, 0)
    assert stopping.early_end() is None
    assert stopping.allowed_s("SIGTERM") == LAST_SAVE_LIMIT_S
    assert read_stop_request(config.run_dir, 0) is None
    write_early_end(config.run_dir, 0, END)
    assert stopping.early_end() is None  # it looks once a second
    assert stopping.early_end(at_once=True) == END
    assert stopping.early_end() == END
    assert stopping.allowed_s("SIGTERM") == 0
    assert Stopping(config, 1).early_end() is None, "that of another start"


def test_a_timer_has_nothing_to_save(tmp_path: Path) -> None:
    config = with_overrides(config_of(tmp_path, "save_on_stop_s=40"), ["debug.trainer=timer"])
    assert Stopping(config, 0).allowed_s("SIGTERM") == 0
