"""Parts of the system alone: which roles start, what they need of the machine, and what is checked before."""

import json
import re
from pathlib import Path

import pytest

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.launch.finished import finished_lines
from minpro_megatron.launch.launcher import _conclude
from minpro_megatron.launch.preflight import run_checks as preflight
from minpro_megatron.launch.preflight.run_checks import problems
from minpro_megatron.launch.resume import finished_summary, holds_a_run, obstacles
from minpro_megatron.launch.roles import gpus_needed, role_commands, roles_of
from minpro_megatron.launch.supervisor import Outcome
from minpro_megatron.monitor.server_use import ServerUse
from minpro_megatron.monitor.summary import summarize, write_summary
from minpro_megatron.records import CollectorTotals, EvaluationResult
from tests.support.begun_runs import begin
from tests.support.run_examples import example_config, save_checkpoint, write_example_files
from tests.support.stored_runs import write_run

NUM_PROMPTS, RESPONSES, STEPS = 3, 2, 2  # of stored_runs
ON_GPUS = ["device=cuda", "server.device=cuda", "server.count=3", "server.tensor_parallel=2", "parallel.tensor=4"]
SFT = ["objective.name=sft", "data.demonstrations=sft.jsonl", "batch.responses_per_prompt=1"]
SFT += ["staleness.delay_steps=0"]


def config_with(folder: Path, *overrides: str) -> RunConfig:
    return with_overrides(example_config(folder), list(overrides))


@pytest.mark.parametrize(
    ("overrides", "roles", "gpus"),
    [
        ([], ("serve", "collect", "train"), (4, 6)),
        (["debug.trainer=timer"], ("serve", "collect", "timer"), (0, 6)),
        (["debug.journal=runs/other"], ("train",), (4, 0)),
        (SFT, ("train",), (4, 0)),
        (['server.urls=["http://10.0.0.1:30000"]'], ("serve", "collect", "train"), (4, 0)),
        (["server.engine=reference"], ("serve", "collect", "train"), (4, 0)),
        (["server.device=cpu", "debug.trainer=timer"], ("serve", "collect", "timer"), (0, 0)),
    ],
)
def test_roles_and_their_gpus(
    tmp_path: Path, overrides: list[str], roles: tuple[str, ...], gpus: tuple[int, int]
) -> None:
    config = config_with(tmp_path, *ON_GPUS, *overrides)
    assert roles_of(config) == roles
    assert gpus_needed(config) == gpus
    commands = role_commands(config, Path("/run.json"), 3, {"HOME": "/h"})
    assert tuple(command.role for command in commands) == roles
    visible = [command.environment["CUDA_VISIBLE_DEVICES"] for command in commands]
    shares = {"train": range(gpus[0]), "serve": range(gpus[0], sum(gpus))}
    assert visible == [",".join(map(str, shares.get(role, ()))) for role in roles]


def test_the_timer_is_one_process_that_ends_with_the_run(tmp_path: Path) -> None:
    config = config_with(tmp_path, "debug.trainer=timer", "parallel.tensor=2")
    command = role_commands(config, Path("/run.json"), 3, {})[-1]
    assert command.arguments[1:] == ["-m", "minpro_megatron", "timer", "--config", "/run.json", "--incarnation", "3"]
    assert not command.stays


def test_a_timer_with_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"debug: debug.trainer = timer takes batches from servers, .*only one of the"):
        config_with(tmp_path, "debug.trainer=timer", "debug.journal=runs/other")


def with_journal(folder: Path, *overrides: str) -> RunConfig:
    """A run on the journal that stored_runs writes, whose model and mesh are there and whose prompts are not."""
    write_example_files(folder)
    for name in ("train.jsonl", "heldout.jsonl"):
        (folder / name).unlink()
    write_run(folder / "other", STEPS)
    sizes = [f"num_global_steps={STEPS}", f"batch.num_prompts={NUM_PROMPTS}"]
    sizes += [f"batch.responses_per_prompt={RESPONSES}", f"batch.mini_batch_prompts={NUM_PROMPTS}"]
    return config_with(folder, f"debug.journal={folder / 'other'}", *sizes, *overrides)


def test_training_on_a_journal_needs_no_prompts_ports_or_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "count_gpus", lambda: 0)
    monkeypatch.setattr(preflight, "listening_error", lambda host, port: OSError("in use"))
    servers = ["server.device=cuda", "server.first_port=30000", "collector.port=4000"]
    assert problems(with_journal(tmp_path, *servers)) == []


@pytest.mark.parametrize(
    ("overrides", "pattern"),
    [
        (["num_global_steps=3"], r"^debug.journal = .*/other: global steps 2 of num_global_steps = 3 are not in it"),
        (["parallel.tensor=8"], r"^parallel.tensor = 8 must divide the model's num_attention_heads = 4"),
        (["device=cuda"], r"^device = cuda: no usable NVIDIA GPU on this machine; set device=cpu$"),
    ],
)
def test_obstacles_to_training_on_a_journal_are_reported_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], pattern: str
) -> None:
    monkeypatch.setattr(preflight, "count_gpus", lambda: 0)
    (problem,) = problems(with_journal(tmp_path, *overrides))
    assert re.search(pattern, problem)


def test_a_timer_needs_neither_mesh_nor_converted_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "count_gpus", lambda: 1)
    write_example_files(tmp_path)
    (tmp_path / "megatron" / "manifest.json").unlink()
    timer = ["debug.trainer=timer", "parallel.tensor=8", "device=cuda", "server.device=cuda"]
    assert problems(config_with(tmp_path, *timer)) == []
    (tmp_path / "train.jsonl").unlink()
    assert [problem.split(" = ")[0] for problem in problems(config_with(tmp_path, *timer))] == ["data.train_file"]


def test_ports_of_servers_that_somebody_else_started_are_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_example_files(tmp_path)
    monkeypatch.setattr(preflight, "listening_error", lambda host, port: OSError("in use"))
    urls = 'server.urls=["http://10.0.0.1:30000"]'
    assert problems(config_with(tmp_path, "server.first_port=30000", urls)) == []
    assert len(problems(config_with(tmp_path, "server.first_port=30000"))) == 1


def test_a_run_on_a_journal_is_not_started_again_by_accident(tmp_path: Path) -> None:
    config = with_journal(tmp_path)
    run_dir = config.run_dir
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").touch()
    assert not holds_a_run(run_dir)  # it failed before its first step
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 0, "time": 1.0, "metrics": {}}) + "\n")
    (run_dir / "run.json").write_text(config.to_json())
    assert holds_a_run(run_dir)
    assert list(obstacles(config)) == []
    write_summary(run_dir, finished(config))
    assert list(obstacles(config)) == []
    assert finished_summary(config) == finished(config)
    assert "other settings (debug.journal" in problems(with_overrides(config, ["debug.journal="]))[-1]


def test_a_run_on_a_journal_can_be_made_longer_from_its_end(tmp_path: Path) -> None:
    config = begin(tmp_path, debug={"journal": "elsewhere"}, staleness={"delay_steps": 2})
    save_checkpoint(config, 4)
    assert list(obstacles(with_overrides(config, ["num_global_steps=6"]))) == []


def evaluation(version: int) -> EvaluationResult:
    return EvaluationResult(
        policy_version=version, pass_at_1=0.25, standard_error=0.1,
        mean_reward=0.25, not_graded=0, num_prompts=2, samples_per_prompt=2,
        mean_response_tokens=2.5, wall_time_s=0.1,
    )  # fmt: skip


def finished(config: RunConfig, evaluations: list[EvaluationResult] | None = None, servers: ServerUse | None = None):
    totals = CollectorTotals(
        groups_issued=6, groups_consumed=6, groups_dropped=0, groups_not_graded=0,
        smallest_staleness=0, largest_staleness=1,
        versions_published=0, evaluations=evaluations or [],
    )  # fmt: skip
    return summarize(
        config, totals, steps=2, updates=0, wall_time_s=9.0, wall_time_by_phase_s={}, hf_export=None, servers=servers
    )


def test_what_a_run_without_servers_says_at_its_end(tmp_path: Path) -> None:
    lines = finished_lines(example_config(tmp_path), finished(example_config(tmp_path)), None)
    assert [line.split()[0] for line in lines] == ["finished", "TensorBoard"]


@pytest.mark.parametrize(
    ("idle_share", "line"),
    [
        (
            0.25,
            "servers      1,200 tokens/s together (2 of them), idle for 25 % of the time; 1,600 tokens/s without that",
        ),
        (None, "servers      1,200 tokens/s together (2 of them)"),
    ],
)
def test_what_a_timer_says_at_its_end(tmp_path: Path, idle_share: float | None, line: str) -> None:
    use = ServerUse(
        num_servers=2, num_tokens=5000, tokens_per_s=1200, idle_share=idle_share,
        tokens_per_s_if_never_idle=None if idle_share is None else 1600, batch_seconds=[1, 2, 9],
    )  # fmt: skip
    # both evaluations are of the initial weights: no rise to tell of
    summary = finished(example_config(tmp_path), [evaluation(0), evaluation(2)], use)
    lines = finished_lines(example_config(tmp_path), summary, None)
    assert lines[1:3] == [line, "batches      2.0 s each (median), 9.0 s at most"]
    assert not any(line.startswith("pass@1") for line in lines)


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [([], "launch the same command again to resume"), (["debug.trainer=timer"], "measure again under a new name=...")],
)
def test_what_is_to_be_done_after_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], remedy: str
) -> None:
    """A measurement is not taken up again (launch/resume.py)."""
    assert _conclude(config_with(tmp_path, *overrides), Outcome(130, interrupted_by="SIGINT")) == 130
    assert capsys.readouterr().err.splitlines() == ["interrupted by SIGINT; all processes were stopped", remedy]
