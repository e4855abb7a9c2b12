"""Runs whose processes are killed, and that go on by the same command: a few of the cases of `make test-crashes`."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import TinyModel
from tests.e2e.crashes import (
    DELAY,
    EVERY,
    PROMPTS,
    RESPONSES,
    STEPS,
    CrashPoint,
    CrashRun,
    Results,
    differing,
    make_model,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("crash_model"))


@pytest.fixture(scope="module")
def undisturbed(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Results:
    run = CrashRun(model, tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    run.finish()
    check_undisturbed(run.run_dir, model)
    return Results.read(run.run_dir)


def check_undisturbed(run_dir: Path, model: TinyModel) -> None:
    """What a run of delay mode is, apart from other runs; and that it trains: equal runs that do nothing prove
    nothing."""
    results = Results.read(run_dir)
    assert results.states == {"consumed": STEPS * PROMPTS}
    for group_id, (step, _, batch_index, issued_version, oldest_version, staleness) in results.groups.items():
        assert step == batch_index == group_id // PROMPTS
        assert issued_version == oldest_version == max(0, step - DELAY)
        assert staleness == min(step, DELAY)
    seeds = [seed for seeds in results.seeds.values() for seed in seeds]
    assert len(set(seeds)) == len(seeds) == STEPS * PROMPTS * RESPONSES
    assert [one["policy_version"] for one in results.evaluations] == list(range(0, STEPS + 1, EVERY))
    mixed = {
        results.groups[group_id][0]
        for group_id, responses in results.rollouts.items()
        if len({response[4] for response in responses}) > 1
    }
    assert len(mixed) >= STEPS // 2
    norms = [metrics["optimizer/grad_norm"] for _, is_step, metrics in results.metrics if is_step]
    assert len(norms) == STEPS
    assert min(norms) > 0


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
    assert "launch the same command again to go on" in launched.output
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


def check_bounded(run_dir: Path, undisturbed: Results) -> None:
    """Every group once, none lost, the prompts and seeds of its id, no token too old or too new."""
    results = Results.read(run_dir)
    assert results.states == {"consumed": STEPS * PROMPTS}
    assert sorted(results.groups) == sorted(undisturbed.groups)
    assert results.seeds == undisturbed.seeds
    consumed: dict[int, int] = {}
    for group_id, (step, prompt_id, _, _, oldest_version, staleness) in results.groups.items():
        consumed[step] = consumed.get(step, 0) + 1
        assert prompt_id == undisturbed.groups[group_id][1]
        assert staleness == step - oldest_version
        assert 0 <= staleness <= 2
    assert consumed == dict.fromkeys(range(STEPS), PROMPTS)
    with closing(sqlite3.connect(f"file:{run_dir / 'journal.sqlite'}?mode=ro", uri=True)) as journal:
        too_new = "SELECT count(*) FROM groups WHERE newest_version > consumed_step"
        assert journal.execute(too_new).fetchone()[0] == 0
    assert [one["policy_version"] for one in results.evaluations] == list(range(0, STEPS + 1, EVERY))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["largest_staleness"] <= 2) == (STEPS, True)
