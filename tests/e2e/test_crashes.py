"""Runs whose processes are killed, and that go on by the same command: a few of the cases of `make test-crashes`."""

from pathlib import Path

import pytest

from tests.e2e.conftest import TinyModel
from tests.e2e.crash_checks import check_bounded, check_episodes, model, undisturbed, undisturbed_episodes
from tests.e2e.crashes import (
    CrashPoint,
    CrashRun,
    Results,
    differing,
)
from tests.e2e.episode_environment import EPISODES

__all__ = ["model", "undisturbed", "undisturbed_episodes"]  # fixtures

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.mark.long
def test_a_run_that_is_killed_twice_and_loses_its_journals_end_and_its_server_equals_the_undisturbed_one(
    model: TinyModel, undisturbed: Results, tmp_path: Path
) -> None:
    run = CrashRun(model, tmp_path, "killed")
    in_transaction = CrashPoint(
        "collect",
        "minpro_megatron.buffer.journal:_expect_rows",
        moment="after",
        within="minpro_megatron.buffer.journal:Journal.consume",
        within_call=4,
    )
    launched = run.launch(in_transaction)
    assert (launched.status, launched.reached) == (1, True), launched.output
    assert "error: the role collect was ended by signal SIGKILL" in launched.output
    assert "launch the same command again to resume" in launched.output
    run.tear_journal(0.1)  # what version 2 has sampled is lost: its weights, loaded again, sample it again
    in_update = CrashPoint(
        "train",
        "minpro_megatron.actor.forward:ForwardStep.__call__",
        call=2,
        within="minpro_megatron.actor.policy:Policy.update",
        within_call=4,
        rank=1,
    )
    launched = run.launch(in_update)
    assert (launched.status, launched.reached) == (1, True), launched.output
    assert "error: the role train failed" in launched.output
    while_generating = CrashPoint("collect", "minpro_megatron.fleet.member:Member.generate", call=6, victim="server")
    launched = run.launch(while_generating)  # not of the launch: serve starts another one
    assert (launched.status, launched.reached) == (0, True), f"{launched.output}\n{run.logs()}"
    assert run.num_launches == 3
    assert "restart 1 of at most" in (run.run_dir / "logs" / "serve.log").read_text()
    assert differing(Results.read(run.run_dir), undisturbed) == []


@pytest.mark.long
def test_a_bounded_run_whose_launcher_is_killed_while_a_checkpoint_is_named_loses_no_group(
    model: TinyModel, undisturbed: Results, tmp_path: Path
) -> None:
    run = CrashRun(model, tmp_path, "bounded", "staleness.mode=bounded", "staleness.max_staleness=2")
    renamed_and_not_named = CrashPoint(
        "train",
        "minpro_megatron.checkpoints.checkpoint_folder:replace_file",
        call=2,
        within="minpro_megatron.checkpoints.checkpoint_folder:CheckpointFolder.publish",
        within_call=2,
        victim="launcher",
    )
    launched = run.launch(renamed_and_not_named)
    assert (launched.status, launched.reached) == (-9, True), launched.output
    run.finish()
    check_bounded(run.run_dir, undisturbed)


@pytest.mark.long
def test_a_run_with_episodes_whose_server_and_collector_are_killed_between_turns_equals_the_undisturbed_one(
    model: TinyModel, undisturbed_episodes: Results, tmp_path: Path
) -> None:
    run = CrashRun(model, tmp_path, "episodes", *EPISODES)
    asked = CrashPoint("collect", "tests.e2e.episode_environment:Again.answer", call=90)
    launched = run.launch(asked)
    assert (launched.status, launched.reached) == (1, True), launched.output
    assert "error: the role collect was ended by signal SIGKILL" in launched.output
    sent = CrashPoint("collect", "minpro_megatron.fleet.member:Member.generate", call=30, victim="server")
    launched = run.launch(sent)
    assert (launched.status, launched.reached) == (0, True), f"{launched.output}\n{run.logs()}"
    check_episodes(run.run_dir)
    assert differing(Results.read(run.run_dir), undisturbed_episodes) == []
