"""What a report says of the code and the environment of a run."""

import re
import subprocess

from minpro_megatron.monitor import environment
from minpro_megatron.monitor.environment import read_environment, write_environment
from minpro_megatron.report.report import write_report
from tests.support.report_pages import assert_safe, write_run


def test_the_environment_is_that_of_the_run_and_not_of_who_makes_the_report(tmp_path, monkeypatch):
    write_run(tmp_path, [])
    assert "machine and versions" not in write_report(tmp_path).read_text()
    write_environment(tmp_path)
    monkeypatch.setattr(environment.platform, "node", lambda: "another machine")
    found = read_environment(tmp_path)
    assert found["torch"]
    assert found["python"]
    assert re.search("of [0-9]+", found["processors"])
    text = assert_safe(write_report(tmp_path).read_text()).text
    assert found["machine"] in text
    assert "another machine" not in text


def test_the_commit_is_that_of_the_code_and_says_whether_files_were_changed(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    assert environment.git_commit(tmp_path) == ""
    subprocess.run([*git, "init", "-q"], check=True)
    assert environment.git_commit(tmp_path) == ""  # nothing is committed yet
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    commit = environment.git_commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "file").write_text("2")
    assert environment.git_commit(tmp_path) == f"{commit} and 1 changed files"
    (tmp_path / "inner").mkdir()
    assert environment.git_commit(tmp_path / "inner") == ""  # a copy of the code within somebody's repository
