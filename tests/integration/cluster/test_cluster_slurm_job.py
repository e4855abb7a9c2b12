"""What is read from Slurm's own words, recorded from Slurm 22.05 (scontrol) and its manual (sacct)."""

import io
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from minpro_megatron.cluster import follow as following
from minpro_megatron.cluster.follow import HERE, OVER_SSH, Intervals, LogTail, follow
from minpro_megatron.cluster.records import JobRecord, all_records, recall, remember
from minpro_megatron.cluster.save_and_end import REQUEST, request_save_and_end
from minpro_megatron.cluster.shell import Answer, LoginNode, ThisMachine
from minpro_megatron.cluster.slurm_job import (
    JobError,
    JobState,
    active_jobs,
    look_up,
    no_restart_file,
    parse_sacct,
    parse_scontrol,
    parse_script_output,
)
from minpro_megatron.errors import UserError
from minpro_megatron.launch.starts import Plan, Start
from minpro_megatron.run_folder.early_end import read_stop_request
from tests.support.begun_runs import begin

SCONTROL = """\
JobId=7 JobName=minpro-whole
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Priority=4294901758 Nice=0 Account=(null) QOS=(null)
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode={code}
   RunTime=00:00:33 TimeLimit=00:20:00 TimeMin=N/A
   ReqNodeList=(null) ExcNodeList=(null)
   NodeList={nodes}
   BatchHost=node1
   NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
"""


def scontrol(state: str, code: str = "0:0", reason: str = "None", restarts: int = 0, nodes: str = "node[1-2]") -> str:
    return SCONTROL.format(state=state, code=code, reason=reason, restarts=restarts, nodes=nodes)


class Answers(ThisMachine):
    """Answers commands by their first word, and runs all others for real."""

    def __init__(self, **answers: Callable[[], Answer]) -> None:
        self.answers, self.commands = answers, list[str]()

    def run(self, command: str, hide: bool = True, warn: bool = False) -> Answer:
        self.commands.append(command)
        if (known := self.answers.get(command.split()[0])) is not None:
            return known()
        return super().run(command, hide, warn)


def answer(stdout: str = "", stderr: str = "", return_code: int = 0) -> Answer:
    return Answer(stdout, stderr, return_code)


@pytest.mark.parametrize(
    ("text", "shown", "ended", "succeeded"),
    [
        (scontrol("PENDING", reason="Resources", nodes="(null)"), "PENDING (Resources)", False, False),
        (scontrol("RUNNING"), "RUNNING on node[1-2]", False, False),
        (scontrol("COMPLETED", restarts=1), "COMPLETED on node[1-2] after 1 restart", True, True),
        (scontrol("FAILED", "2:0", "NonZeroExitCode"), "FAILED (exit status 2) on node[1-2]", True, False),
        (scontrol("CANCELLED", "0:15"), "CANCELLED (exit status 143) on node[1-2]", True, False),
        (scontrol("TIMEOUT", "0:0", restarts=3), "TIMEOUT (exit status 0) on node[1-2] after 3 restarts", True, False),
    ],
)  # fmt: skip
def test_scontrol_is_understood(text: str, shown: str, ended: bool, succeeded: bool) -> None:
    state = parse_scontrol(text)
    assert (str(state), state.has_ended, state.has_succeeded) == (shown, ended, succeeded)


def test_accounting_is_understood() -> None:
    assert parse_sacct("COMPLETED|0:0|n1\n") == JobState(state="COMPLETED", nodes="n1")
    text = "REQUEUED|1:0|n1\nCANCELLED by 1000|0:15|n[1-4]\n"
    assert parse_sacct(text) == JobState(state="CANCELLED", exit_status=143, nodes="n[1-4]")


def test_the_scripts_own_last_line_is_better_than_nothing() -> None:
    assert parse_script_output("") is None
    text = "job exited with code 1\n+ other\njob exited with code 0\n"
    assert parse_script_output(text) == JobState(state="COMPLETED", restarts=1)
    assert parse_script_output("job exited with code 2\n") == JobState(state="FAILED", exit_status=2)


def test_a_job_that_slurm_forgot_is_found_elsewhere(tmp_path: Path) -> None:
    forgotten = {"scontrol": lambda: answer(stderr="slurm_load_jobs error: Invalid job id specified", return_code=1)}
    without_accounting = {"sacct": lambda: answer(stderr="Slurm accounting storage is disabled", return_code=1)}
    accounted = look_up(Answers(**forgotten, sacct=lambda: answer("TIMEOUT|0:0|n1\n")), "7", str(tmp_path))
    assert accounted.state == "TIMEOUT"
    shell = Answers(**forgotten, **without_accounting)
    with pytest.raises(JobError, match=f"job 7: Slurm has discarded it, there is no accounting, and {tmp_path} does"):
        look_up(shell, "7", str(tmp_path))
    (tmp_path / "sbatch_minpro-a_7.out").write_text("job exited with code 1\n")
    (tmp_path / "sbatch_minpro-a_77.out").write_text("job exited with code 0\n")
    assert look_up(shell, "7", str(tmp_path)) == JobState(state="FAILED", exit_status=1)


def test_a_cluster_that_does_not_answer_is_no_end() -> None:
    away = answer(stderr="Unable to contact slurm controller", return_code=1)
    with pytest.raises(JobError, match="scontrol: Unable to contact slurm controller"):
        look_up(Answers(scontrol=lambda: away), "7", "/none")
    with pytest.raises(JobError, match="squeue: Unable"):
        active_jobs(Answers(squeue=lambda: away), "minpro-a")
    assert active_jobs(Answers(squeue=lambda: answer("7\n9\n")), "minpro-a") == ["7", "9"]


def test_words_of_others_are_quoted() -> None:
    shell = Answers(squeue=answer, scontrol=lambda: answer(scontrol("RUNNING")))
    active_jobs(shell, "a; rm -r x")
    look_up(shell, "7; rm", "/none")
    assert shell.commands == [
        "squeue --me --noheader --format=%i --name='a; rm -r x'", "scontrol show job '7; rm'",
    ]  # fmt: skip


def test_the_log_is_shown_as_it_grows_over_all_starts(tmp_path: Path) -> None:
    out = io.StringIO()
    folder = tmp_path / "with space"
    folder.mkdir()
    tail = LogTail(Answers(), str(folder), "7", out)
    tail.show_news()
    first = folder / "log-minpro-a_7_0.out"
    first.write_bytes("one\nä".encode()[:-1])
    (folder / "log-minpro-a_77_0.out").write_text("of another job\n")
    tail.show_news()
    assert out.getvalue() == "one\n"
    with first.open("ab") as file:
        file.write("ä".encode()[-1:] + b"\n\xff\n")
    (folder / "log-minpro-a_7_10.out").write_text("eleventh\n")
    (folder / "log-minpro-a_7_2.out").write_text("third\n")
    tail.show_news()
    tail.show_news()
    assert out.getvalue() == "one\nä\n\ufffd\nthird\neleventh\n"


AT_ONCE = Intervals(state_s=0.001, state_soon_s=0.001, log_s=0.001)


@pytest.mark.parametrize("intervals", [HERE, OVER_SSH])
def test_the_controller_is_asked_rarely_and_the_log_is_read_in_between(
    intervals: Intervals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of questions in a job of 24 hours, by a clock that only waits."""
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(following, "time", SimpleNamespace(monotonic=lambda: now, sleep=wait))
    listed = answer("")
    shell = Answers(scontrol=lambda: answer(scontrol("COMPLETED" if now > 86_400 else "RUNNING")), ls=lambda: listed)
    assert follow(shell, "7", str(tmp_path), io.StringIO(), lambda line: None, intervals).has_succeeded
    asked = [command.split()[0] for command in shell.commands]
    assert asked.count("scontrol") < 86_400 / 30 + 12
    assert asked.count("ls") < 86_400 / (15 if intervals is OVER_SSH else 5) * 1.01 + 12
    assert now < 86_400 + 31


def test_following_ends_with_the_job(tmp_path: Path) -> None:
    answers = [
        scontrol("PENDING", reason="Priority", nodes="(null)"), None, scontrol("RUNNING"), scontrol("RUNNING"),
        scontrol("PENDING", reason="BeginTime", restarts=1), scontrol("COMPLETED", restarts=1),
    ]  # fmt: skip
    steps = iter(answers)

    def next_state() -> Answer:
        text = next(steps)
        (tmp_path / "log-a_7_0.out").open("a").write("line\n")
        return answer(text) if text else answer(stderr="timed out", return_code=1)

    said, out = list[str](), io.StringIO()
    state = follow(Answers(scontrol=next_state), "7", str(tmp_path), out, said.append, AT_ONCE)
    assert state.has_succeeded
    assert out.getvalue() == "line\n" * len(answers)
    assert [line.removeprefix("job 7: ") for line in said] == [
        "PENDING (Priority)", "RUNNING on node[1-2]", "PENDING (BeginTime) on node[1-2] after 1 restart",
        "COMPLETED on node[1-2] after 1 restart",
    ]  # fmt: skip


def test_a_cluster_that_is_unreachable_for_long_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_MAX_SILENCE_S", 0.01)
    gone = Answers(scontrol=lambda: answer(stderr="gone", return_code=1))
    with pytest.raises(JobError, match="scontrol: gone"):
        follow(gone, "7", "/none", io.StringIO(), print, AT_ONCE)


def test_a_lost_connection_is_an_answer_and_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_MAX_SILENCE_S", 5.0)
    (tmp_path / "log-a_7_0.out").write_text("line\n")
    # what each connection does with one command after the other: run it, or fail as the libraries of NeMo-Run do
    connections = iter([[None, EOFError()], SystemExit(1), [None, None, OSError("reset")], [None] * 9])
    nodes = Answers(scontrol=lambda: answer(scontrol("COMPLETED" if next(looks) > 2 else "RUNNING")))
    looks = iter(range(9))

    class Connection:
        def __init__(self, ends: Sequence[BaseException | None]) -> None:
            self._ends = iter(ends)

        def run(self, command: str, hide: bool, warn: bool) -> Answer:
            if (end := next(self._ends)) is not None:
                raise end
            return nodes.run(command.removeprefix("export LC_ALL=C; "), hide, warn)

    def connect() -> Connection:
        ends = next(connections)
        if isinstance(ends, BaseException):
            raise ends
        return Connection(ends)

    shell, out = LoginNode(connect), io.StringIO()
    assert follow(shell, "7", str(tmp_path), out, lambda line: None, AT_ONCE).has_succeeded
    assert out.getvalue() == "line\n"
    with pytest.raises(JobError, match=r"scontrol: no connection to the login node \(StopIteration"):
        look_up(LoginNode(lambda: next(iter(()))), "7", "/none")
    with pytest.raises(subprocess.CalledProcessError, match="255"):
        LoginNode(lambda: next(iter(()))).run("true")


def record(name: str, job_id: str, submitted_at: float, **more: object) -> JobRecord:
    given = {"run_dir": f"/runs/{name}", "log_folder": "/logs", "submitted_at": submitted_at} | more
    return JobRecord(name=name, job_id=job_id, **given)  # type: ignore[arg-type]


RUNNING = JobState(state="RUNNING", restarts=1)


@pytest.fixture
def begun(tmp_path: Path) -> JobRecord:
    """The record of job 7, whose second start is the run's tenth."""
    config = begin(tmp_path)
    for number, key in ((8, "slurm-7-0"), (9, "slurm-7-1")):
        start = Start(config.run_dir / "starts" / str(number))
        start.write_plan(Plan(key=key))
    return record("example", "7", 1.0, run_dir=str(config.run_dir), jobs_folder=str(tmp_path))


def test_a_running_job_is_asked_to_save_and_to_end(begun: JobRecord, tmp_path: Path) -> None:
    request_save_and_end(Answers(), begun, RUNNING)
    assert read_stop_request(Path(begun.run_dir), 9) == REQUEST
    assert read_stop_request(Path(begun.run_dir), 8) is None
    assert Path(no_restart_file(str(tmp_path), "7")).exists()


@pytest.mark.parametrize(
    ("state", "settings", "problem"),
    [
        (
            JobState(state="PENDING", reason="Priority"),
            {},
            r"job 7 is PENDING \(Priority\), and only a running one can",
        ),
        (JobState(state="RUNNING", restarts=2), {}, "the present start of job 7 has not reached its run folder"),
        (RUNNING, {"checkpoint": {"every_steps": 0}}, "the run example saves nothing before its end"),
    ],
)
def test_a_job_that_cannot_save_is_not_asked(
    state: JobState, settings: dict[str, object], problem: str, begun: JobRecord, tmp_path: Path
) -> None:
    begin(tmp_path, **settings)
    with pytest.raises(UserError, match=f"--save: {problem}"):
        request_save_and_end(Answers(), begun, state)
    assert not Path(no_restart_file(str(tmp_path), "7")).exists()
    assert read_stop_request(Path(begun.run_dir), 9) is None


def test_a_save_that_the_cluster_cannot_be_asked_for_is_reported(begun: JobRecord) -> None:
    away = Answers(ls=lambda: answer(stderr="no connection to the login node", return_code=255))
    with pytest.raises(JobError, match="no connection to the login node"):
        request_save_and_end(away, begun, RUNNING)


@pytest.mark.parametrize("failing", ["touch", "mv"])
def test_a_request_that_fails_leaves_the_job_its_restarts(
    failing: str, begun: JobRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / failing).write_text(f"#!/bin/bash\necho '{failing}: no space left' >&2; exit 1\n")
    (programs / failing).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with pytest.raises(JobError, match=f"{failing}: no space left"):
        request_save_and_end(ThisMachine(), begun, RUNNING)
    assert not Path(no_restart_file(str(tmp_path), "7")).exists()
    assert read_stop_request(Path(begun.run_dir), 9) is None


def test_a_run_folder_without_starts_has_not_begun(begun: JobRecord) -> None:
    shutil.rmtree(Path(begun.run_dir) / "starts")
    with pytest.raises(UserError, match="--save: the present start of job 7 has not reached its run folder"):
        request_save_and_end(ThisMachine(), begun, RUNNING)


def test_commands_of_the_cluster_answer_in_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert ThisMachine().run("echo $LC_ALL").stdout == "C\n"
    given = list[str]()

    def run(command: str, hide: bool, warn: bool) -> Answer:
        given.append(command)
        return ThisMachine().run(command, hide, warn)

    assert LoginNode(lambda: SimpleNamespace(run=run)).run("echo $LC_ALL; false; true").stdout == "C\n"
    assert given == ["export LC_ALL=C; echo $LC_ALL; false; true"]


def test_a_name_stands_for_its_last_job(tmp_path: Path) -> None:
    records = [record("a", "9", 1.0), record("b", "10", 2.0), record("a", "11", 3.0, ssh={"host": "h", "user": "u"})]
    for one in reversed(records):
        remember(tmp_path, one)
    assert all_records(tmp_path) == records
    assert recall(tmp_path, "a") == records[2]
    assert recall(tmp_path, "9") == records[0]
    settings = recall(tmp_path, "a").ssh_settings
    assert settings is not None
    assert settings.host == "h"
    with pytest.raises(UserError, match="job 'c': not submitted from this machine; known: a, b"):
        recall(tmp_path, "c")
