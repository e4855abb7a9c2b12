"""While `submit` still checks a run, `status` says so."""

import os
import platform
import time
from pathlib import Path

import msgspec
import pytest

from minpro_megatron.cluster import status, submit
from minpro_megatron.cluster.local_job import local_state
from minpro_megatron.cluster.paths import CHECKOUT
from minpro_megatron.cluster.records import (
    JobRecord,
    RunCheck,
    checks_under_way,
    noted_check,
    recall,
    records_folder,
    remember,
)
from minpro_megatron.errors import FAILED, TO_BE_CONTINUED, UserError

THIS_MACHINE = str(CHECKOUT / "cluster" / "profiles" / "this_machine.toml")
SINCE_2000, NO_PROCESS = 946684800.0, 2**22 + 1


@pytest.fixture(autouse=True)
def _own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path))


def record(name: str, submitted_at: float, process_id: int | None = None, exit_status: int | None = None) -> JobRecord:
    return JobRecord(
        name=name,
        job_id="7",
        run_dir="runs/a",
        log_folder="logs",
        submitted_at=submitted_at,
        process_id=process_id,
        exit_status=exit_status,
    )


def test_a_run_that_submit_checks_is_not_an_unknown_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    during = []

    def problems(config: object) -> list[str]:
        capsys.readouterr()
        during.append((status.main(["first"]), capsys.readouterr().out))
        during.append((status.main([]), capsys.readouterr().out))
        return ["broken"]

    monkeypatch.setattr(submit, "run_problems", problems)
    assert submit.main(["recipes.demo:tiny_moe_smoke", "--profile", THIS_MACHINE, "name=first"]) == 2
    for exit_status, shown in during:
        assert exit_status == 0
        assert shown.startswith(
            f"first  not submitted yet: minpro submit (process {os.getpid()}) has been checking it for "
        )
    capsys.readouterr()
    assert status.main(["first"]) == 2
    assert "job 'first': not submitted from this machine" in capsys.readouterr().err


def test_a_second_submit_that_checks_does_not_hide_the_job_of_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    folder = records_folder()
    remember(folder, record("a", time.time(), process_id=os.getpid()))
    with noted_check(folder, "a"):
        assert status.main(["a"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("a  not submitted yet: minpro submit (process ")
        assert lines[1].startswith(f"a  job 7: RUNNING on this machine, process {os.getpid()}; run in runs/a")
        # the check decides about the exit status, and not the job that it follows
        remember(folder, record("a", time.time(), process_id=os.getpid(), exit_status=1))
    with noted_check(folder, "a"):
        assert status.main(["a"]) == 0
    assert status.main(["a"]) == 1


def test_a_job_that_saved_before_its_end_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    saved = record("a", time.time(), process_id=os.getpid(), exit_status=TO_BE_CONTINUED)
    remember(records_folder(), saved)
    assert status.main(["a"]) == 0
    said = "ended with a checkpoint; submit the same command again to resume"
    assert capsys.readouterr().out == f"a  job 7: {said}; run in runs/a\n"
    assert submit.conclude(local_state(saved), saved) == FAILED, "submit succeeds only with a finished run"
    assert capsys.readouterr().err == f"job 7: {said}\n"


def test_other_commands_name_the_check_too() -> None:
    with noted_check(records_folder(), "a"), pytest.raises(UserError, match=r"job 'a': not submitted yet: minpro sub"):
        recall(records_folder(), "a")


def test_a_check_ends_with_its_process_and_with_the_record_of_its_job() -> None:
    folder = records_folder()
    with noted_check(folder, "a"):
        remember(folder, record("a", SINCE_2000))  # of an earlier job
        assert [check.name for check in checks_under_way(folder)] == ["a"]
        remember(folder, record("a", 2 * SINCE_2000))
        assert checks_under_way(folder) == []
    (folder / "b").mkdir()
    for host in (platform.node(), "another-login-node"):  # which may have the same home folder
        killed = RunCheck(name="b", process_id=NO_PROCESS, began_at=SINCE_2000, host=host)
        (folder / "b" / f"{host}.check").write_bytes(msgspec.json.encode(killed))
    assert checks_under_way(folder) == []
    assert [path.name for path in (folder / "b").iterdir()] == ["another-login-node.check"]


def test_a_check_that_ends_while_it_is_looked_up_is_none() -> None:
    folder = records_folder()
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.check").symlink_to(folder / "removed")  # is found, and cannot be read any more
    assert checks_under_way(folder) == []
