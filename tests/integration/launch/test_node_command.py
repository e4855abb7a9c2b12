"""The command `node`: which node it is, one plan a start, reports and a verdict, and how the others' ends are seen."""

import re
from pathlib import Path

import pytest

from minpro_megatron.__main__ import main
from minpro_megatron.errors import TO_BE_CONTINUED, TryAgainError, UserError
from minpro_megatron.launch import agreement, other_nodes
from minpro_megatron.launch.node import _Node, run_node
from minpro_megatron.launch.other_nodes import OtherNodes, OthersFailed
from minpro_megatron.launch.preflight.problems import Problem
from minpro_megatron.launch.run_folder import claimed
from minpro_megatron.launch.starts import Plan, Start, begin_start
from minpro_megatron.launch.supervisor import Outcome
from minpro_megatron.run_folder.early_end import EarlyEnd
from tests.support.run_examples import example_config, save_checkpoint
from tests.support.started_nodes import SLURM, folder, options, roles_started, run_all

__all__ = ["folder", "roles_started"]  # fixtures


def test_all_nodes_of_a_start_are_of_one_incarnation(folder, roles_started, capsys):
    given = options(folder, example_config(folder))
    assert run_all(given, SLURM) == [0, 0]
    assert run_all(given, SLURM | {"SLURM_RESTART_COUNT": "1"}) == [0, 0]
    assert sorted((index, incarnation) for index, incarnation, _ in roles_started) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [plan.key for _, _, plan in roles_started] == ["slurm-7-0"] * 2 + ["slurm-7-1"] * 2
    assert len({port for _, _, plan in roles_started[:2] for port in plan.rendezvous_ports}) == 2
    assert (folder / "runs" / "example" / "run.json").read_text() == (folder / "given.json").read_text()
    shown = capsys.readouterr().out
    assert shown.count("node 0 (h0): run example: minpro, 4 global steps") == 2
    assert "node 0 (h0): node 1 (h1) is ready" in shown


def restarts(folder: Path, first: int, count: int, capsys: pytest.CaptureFixture[str]) -> tuple[list[int], str]:
    """The first node's exit statuses of so many starts of job 7, and what they said on stderr."""
    given = options(folder, example_config(folder))
    statuses = [run_all(given, SLURM | {"SLURM_RESTART_COUNT": str(first + one)})[0] for one in range(count)]
    return statuses, capsys.readouterr().err


def test_two_starts_in_a_row_without_a_new_checkpoint_are_the_last(folder, roles_started, capsys):
    assert restarts(folder, 0, 2, capsys) == ([0, 0], "")
    statuses, said = restarts(folder, 2, 1, capsys)
    assert statuses == [2]
    assert said.startswith(
        "error: starts 1 and 2 of the run have ended without a new checkpoint (there is none yet), so the job is not "
        "started again: "
    )
    assert said.endswith("submit the same command again to resume\n")
    assert len(roles_started) == 2 * 2
    # submitted again: another job, which tries twice
    given = options(folder, example_config(folder))
    assert run_all(given, {"SLURM_JOB_ID": "8"}) == [0, 0]
    assert run_all(given, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}) == [0, 0]
    assert run_all(given, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "2"}) == [2, 0]


def test_the_starts_of_a_job_are_counted_by_its_name_without_slurm(folder, roles_started):
    config = example_config(folder)
    for job, statuses in (("minpro-a-1f", [0, 0, 2]), ("minpro-a-2f", [0])):
        for number, status in enumerate(statuses):
            given = options(folder, config, job=job, start=f"{job}-{number}")
            assert run_all(given, {})[0] == status
    # a start without a job is nobody's restart, however many there were
    assert [run_all(options(folder, config, start=f"a-{number}"), {})[0] for number in range(3)] == [0, 0, 0]


def test_a_start_has_the_name_of_its_job(folder):
    given = options(folder, example_config(folder), job="a", start="b-0", index=0)
    with pytest.raises(UserError, match="--start b-0: with --job a it must be a-NUMBER"):
        run_node(given, {})


def test_every_new_checkpoint_allows_two_more_starts(folder, roles_started, capsys):
    config = example_config(folder)
    assert restarts(folder, 0, 2, capsys)[0] == [0, 0]
    save_checkpoint(config, 1)  # by the second start
    assert restarts(folder, 2, 1, capsys)[0] == [0]
    save_checkpoint(config, 2)
    assert restarts(folder, 3, 2, capsys)[0] == [0, 0]
    statuses, said = restarts(folder, 5, 1, capsys)
    assert statuses == [2]
    assert "starts 4 and 5 of the run have ended without a new checkpoint (still that of global step 2)" in said


def test_starts_that_nodes_refused_do_not_count(folder, roles_started, monkeypatch, capsys):
    """Their roles did not run, so that no checkpoint could be written."""
    assert restarts(folder, 0, 1, capsys)[0] == [0]
    with monkeypatch.context() as patch:
        patch.setattr(agreement, "node_problems", lambda config, share, *_: [Problem("broken")])
        assert restarts(folder, 1, 2, capsys)[0] == [2, 2]
    assert restarts(folder, 3, 1, capsys)[0] == [0]
    assert restarts(folder, 4, 1, capsys)[0] == [2]


def test_an_early_end_is_reported_by_the_first_node_which_ends_last(folder, monkeypatch, capsys):
    """The roles are ended by the supervisor; what it has found is the same on all nodes."""
    end = EarlyEnd(policy_version=3, reason="the time limit leaves 80 s", saved=True)
    ended = []

    def run_roles(self: _Node, start: Start, plan: Plan) -> int:
        status = self._conclude(start, Outcome(TO_BE_CONTINUED, early_end=end))
        ended.append(self._this.index)
        return status

    monkeypatch.setattr(_Node, "_run_roles", run_roles)
    assert run_all(options(folder, example_config(folder)), SLURM) == [75, 0]
    assert ended == [1, 0]
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "node 0 (h0): ended after global step 3, with a checkpoint: the time limit leaves 80 s"


def test_what_is_wrong_with_the_run_is_said_once(folder, roles_started, capsys):
    (folder / "hf" / "tokenizer.json").unlink()
    assert run_all(options(folder, example_config(folder)), SLURM) == [2, 0]
    assert roles_started == []
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match("error: model.hf_path = .*: the tokenizer is missing", line)


def test_what_is_wrong_with_a_node_is_said_with_its_name(folder, roles_started, monkeypatch, capsys):
    """Every node reports before one ends: the user fixes all problems at once."""
    monkeypatch.setattr(agreement, "node_problems", lambda config, share, *_: [Problem(f"broken: {share.ranks} ranks")])
    assert run_all(options(folder, example_config(folder)), SLURM) == [2, 0]
    assert roles_started == []
    lines = sorted(capsys.readouterr().err.splitlines())
    assert lines == ["error: node 0 (h0): broken: 1 ranks", "error: node 1 (h1): broken: 0 ranks"]


@pytest.mark.parametrize(
    ("found", "status"),
    [
        ([Problem("GPU 0: memory in use", is_transient=True)], 69),
        ([Problem("GPU 0: memory in use", is_transient=True), Problem("model.hf_path: no such folder")], 2),
    ],
)
def test_the_status_says_whether_another_start_may_succeed(folder, roles_started, monkeypatch, capsys, found, status):
    monkeypatch.setattr(agreement, "node_problems", lambda config, share, *_: found if share.collects else [])
    assert run_all(options(folder, example_config(folder)), SLURM) == [status, 0]
    assert roles_started == []
    assert capsys.readouterr().err.splitlines() == [f"error: node 1 (h1): {problem.line}" for problem in found]


def test_a_node_that_does_not_come_is_named(folder, roles_started, monkeypatch, capsys):
    monkeypatch.setattr(agreement, "REPORT_LIMIT_S", 0.05)
    given = options(folder, example_config(folder), index=0)
    assert run_node(given, SLURM | {"SLURMD_NODENAME": "vm"}) == 69
    assert re.match(
        r"error: node 1: nothing from it in .*/example/starts after \d+ s", (shown := capsys.readouterr()).err
    )
    assert "node 0 (vm): waiting for 1 of 2 nodes to report\n" in shown.out


def test_without_a_plan_a_node_ends(folder, roles_started, monkeypatch):
    monkeypatch.setattr(agreement, "PLAN_LIMIT_S", 0.05)
    begin_start(folder / "runs" / "example").write_plan(Plan(key="slurm-6-0"))  # of another job
    with pytest.raises(
        TryAgainError, match=r"node 1 \(h1\): no plan of node 0 in .*starts for \d+ s: runs_dir must be on"
    ):
        run_node(options(folder, example_config(folder), index=1), SLURM | {"SLURMD_NODENAME": "h1"})


def test_a_folder_in_use_is_left_alone(folder, roles_started, capsys):
    config = example_config(folder)
    with claimed(config.run_dir):
        (config.run_dir / "report.html").write_text("of the other one")
        assert run_all(options(folder, config), SLURM) == [2, 0]
    assert "another launch is using" in capsys.readouterr().err
    assert (config.run_dir / "report.html").exists()


def test_the_others_ends_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(other_nodes, "_LOOK_EVERY_S", 0.0)
    start = begin_start(tmp_path)
    watch, ticks = OtherNodes(start, 2, 3, [0, 1]), list[int]()
    tick = watch.also(lambda: ticks.append(1))
    tick()
    start.write_done(0, "h0")
    tick()
    assert not watch.others_are_done()
    start.write_done(1, "h1")
    tick()
    assert watch.others_are_done()
    start.write_failed(2, "h2", "its own failure is no news")
    tick()
    start.write_failed(1, "h1", "the role train was ended")
    with pytest.raises(OthersFailed, match=r"node 1 \(h1\) failed: the role train was ended"):
        tick()
    assert len(ticks) == 5


@pytest.mark.parametrize(
    ("more", "environment", "problem"),
    [
        ({"index": 2}, SLURM, "--index 2: the topology has the nodes 0 to 1; give one, or start this with srun on 2"),
        ({}, SLURM, "--index -1: the topology has"),
        ({"index": 0}, {}, "--start is missing: give all nodes of this start the same new name"),
    ],
)
def test_a_node_must_know_which_one_it_is(folder, more, environment, problem):
    with pytest.raises(UserError, match=problem):
        run_node(options(folder, example_config(folder), **more), environment)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["node", "--config", "x.json"], "error: the following arguments are required: --topology"),
        (["serve", "--config", "a", "--incarnation", "0", "--servers", "4"], "'4': expected FIRST:END, such as 4:8"),
        (["serve", "--config", "a", "--incarnation", "0", "--servers", "4:4"], "expected FIRST:END"),
        (["train", "--config", "a", "--incarnation", "0", "--host", "b"], "unrecognized arguments: --host b"),
    ],
)
def test_the_command_line_says_what_is_wrong(arguments, problem, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert problem in capsys.readouterr().err


def test_a_share_of_the_servers_listens_at_the_given_address(folder, monkeypatch):
    from minpro_megatron.roles import serve

    seen: list[tuple[str, range]] = []
    monkeypatch.setattr(
        serve, "run", lambda config, incarnation, servers: seen.append((config.server.host, servers)) or 0
    )
    monkeypatch.setattr("minpro_megatron.launch.prctl.end_with_parent", lambda number: None)
    given = options(folder, example_config(folder))
    arguments = ["serve", "--config", str(given.config), "--incarnation", "0"]
    assert main([*arguments, "--host", "10.0.0.1", "--servers", "4:8"]) == 0
    assert main(arguments) == 0
    assert seen == [("10.0.0.1", range(4, 8)), ("127.0.0.1", None)]
