"""Alarms are raised by real runs made to misbehave, each in its way, and none by a sound one.

The runs are of a few small steps on one rank, with the reference engine or, where rollouts may be what they were, on
the journal of the sound run.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from minpro_megatron.monitor.alarm_log import read_alarms
from minpro_megatron.monitor.history import read_history
from tests.e2e.conftest import ROOT, SMALL_RUN, Launch, Launcher, TinyModel, with_weights

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(600)]

SMALL = (
    *SMALL_RUN,
    "server.health_interval_s=0.5",
    "num_global_steps=14",
    "reward.function=tests.e2e.digits_reward:grade",
)
# the tiny model's rate is 5e-5
TOO_FAST = ("optimizer.warmup_global_steps=0", "optimizer.clip_grad=0", "alarms.window_steps=2")


@pytest.fixture(scope="module")
def sound(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """A run that ended well."""
    launch = Launch(tiny_model, tmp_path_factory.mktemp("sound"), "sound", *SMALL, "collector.journal_keep_steps=0")
    try:
        status, output = launch.wait(150)
    finally:
        launch.end()
    assert status == 0, output
    return launch


def raised(run_dir: Path) -> set[str]:
    """The names of the run's alarms, which its metrics have counted."""
    alarms = read_alarms(run_dir)
    last = [entry for entry in read_history(run_dir) if entry.is_global_step][-1].metrics
    assert last["alarms/raised"] == len(alarms)
    assert all(alarm.seen and alarm.remedy for alarm in alarms)
    return {alarm.name for alarm in alarms}


def test_a_sound_run_raises_none(sound: Launch) -> None:
    entries = [entry for entry in read_history(sound.run_dir) if entry.is_global_step]
    assert len(entries) == 14  # more than a window
    assert raised(sound.run_dir) == set()


def test_a_learning_rate_far_too_high_breaks_the_numbers(sound: Launch, launches: Launcher) -> None:
    rate = ("optimizer.learning_rate=1e19", 'alarms.stop_on=["not_finite"]')
    broken = launches("broken", *SMALL, *TOO_FAST, *rate, f"debug.journal={sound.run_dir}")
    status, output = broken.wait(100)
    assert status == 1, output
    assert "train: alarms.stop_on: not_finite at global step" in output
    assert "not_finite" in raised(broken.run_dir)


@pytest.mark.parametrize(
    ("reward", "names"),
    [
        # which a policy of few words gets, and one that such a policy loses
        ("tests.e2e.digits_reward:grade", {"effective_sample_size", "entropy_collapse"}),
        ("tests.e2e.variety_reward:grade", {"effective_sample_size", "reward_drop"}),
    ],
)
def test_a_learning_rate_too_high_ruins_the_policy(reward: str, names: set[str], launches: Launcher) -> None:
    settings = ("optimizer.learning_rate=0.05", f"reward.function={reward}")
    ruined = launches("ruined", *SMALL, *TOO_FAST, *settings)
    status, output = ruined.wait(150)
    assert status == 0, output
    assert names <= raised(ruined.run_dir)


@pytest.fixture(scope="module")
def confident(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """The tiny model with a fraction of its entropy, but for `*`, which it never says."""
    tensors = load_file(tiny_model.hf / "model.safetensors")
    tensors["lm_head.weight"] *= 60
    tensors["lm_head.weight"][_token(tiny_model, "*")] = 0
    return with_weights(tiny_model, tensors, tmp_path_factory.mktemp("confident"))


def _token(model: TinyModel, text: str) -> int:
    return json.loads((model.hf / "tokenizer.json").read_text())["model"]["vocab"][text]


def test_a_weight_decay_far_too_high_makes_the_policy_forget(confident: TinyModel, tmp_path: Path) -> None:
    decay = ("optimizer.weight_decay=4000", "optimizer.warmup_global_steps=0", "alarms.window_steps=2")
    assert "entropy_explosion" in _raised_with(confident, tmp_path, *decay)


def test_prompts_with_a_token_that_was_never_trained_give_spikes(confident: TinyModel, tmp_path: Path) -> None:
    """The last prompts have a `*`. Where its embedding is zero, the norms' gradients there are some thousand times the
    others'."""
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in (ROOT / "recipes" / "data" / "calculator_train.jsonl").open()]
    easy = [row | {"pass_rate": 0.9} for row in rows if "*" not in row["prompt"]][:40]
    hard = [row | {"pass_rate": 0.1} for row in rows if "*" in row["prompt"]][:16]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in easy + hard))
    data = (f"data.train_file={prompts}", "data.curriculum=easy_first", "optimizer.learning_rate=1e-7")
    assert "gradient_spikes" not in _raised_with(confident, tmp_path / "trained", *data)

    tensors = load_file(confident.hf / "model.safetensors")
    tensors["model.embed_tokens.weight"][_token(confident, "*")] = 0
    untrained = with_weights(confident, tensors, tmp_path / "model")
    assert "gradient_spikes" in _raised_with(untrained, tmp_path / "untrained", *data)


def _raised_with(model: TinyModel, runs_dir: Path, *settings: str) -> set[str]:
    launch = Launch(model, runs_dir, "run", *SMALL, *settings)
    try:
        status, output = launch.wait(150)
    finally:
        launch.end()
    assert status == 0, output
    return raised(launch.run_dir)


def test_servers_that_run_ahead_and_one_that_is_killed(launches: Launcher) -> None:
    bounded = ("staleness.mode=bounded", "staleness.max_staleness=1", "server.count=2", "batch.mini_batch_prompts=1")
    launch = launches("ahead", *SMALL, *bounded, "num_global_steps=100", 'alarms.stop_on=["server_loss"]')
    deadline = time.monotonic() + 150
    while len(read_history(launch.run_dir)) < 12:
        assert launch.process.poll() is None, launch.wait(5)[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    _servers(launch)[0].kill()
    status, output = launch.wait(100)
    assert status == 1, output
    assert "train: alarms.stop_on: server_loss at global step" in output
    assert raised(launch.run_dir) == {"server_loss", "staleness_at_bound"}


def _servers(launch: Launch) -> list[psutil.Process]:
    return [one for one in launch.descendants() if "minpro_megatron.reference_engine" in one.cmdline()]


@pytest.fixture
def hot_server(tiny_model: TinyModel, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.e2e.hot_server", "--model-path", str(tiny_model.hf), "--port", str(port)]
    with (tmp_path / "hot.log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


def test_a_server_that_samples_at_another_temperature(launches: Launcher, hot_server: str) -> None:
    launch = launches("hot", *SMALL, f'server.urls=["{hot_server}"]', 'alarms.stop_on=["mismatch"]')
    status, output = launch.wait(150)
    assert status == 1, output
    assert "train: alarms.stop_on: mismatch at global step" in output
    assert "mismatch" in raised(launch.run_dir)
