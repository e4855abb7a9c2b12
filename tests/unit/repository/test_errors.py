"""What commands and roles report when they end with an error: a line for the project's own, everything for others."""

import errno
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron import __main__, errors
from minpro_megatron.commands import recipes
from minpro_megatron.errors import (
    FAILED,
    INTERRUPTED,
    TRY_AGAIN,
    WRONG_INPUT,
    ProjectError,
    TryAgainError,
    UserError,
    run_reporting,
)
from minpro_megatron.launch.launcher import closing_lines
from minpro_megatron.launch.supervisor import Failure, Outcome
from minpro_megatron.monitor import rank_failures
from minpro_megatron.monitor.rank_failures import FOLDER_VARIABLE, first_rank_failure, write_rank_failure
from minpro_megatron.roles import collect, serve
from tests.support.rollout_fakes import run_config


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


def library_error(*_: object) -> int:
    """A mistake of this program that a library notices: a ValueError, as a user's mistake may be one."""
    return int((np.zeros(2) + np.zeros(3))[0])


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (ProjectError("the servers\n  are gone"), FAILED, ["name: the servers are gone"]),
        (UserError(["seed = x: a number", "a = b: no"]), WRONG_INPUT, ["name: seed = x: a number", "name: a = b: no"]),
        (TryAgainError("GPU 0: in use"), TRY_AGAIN, ["name: GPU 0: in use"]),
        (FileNotFoundError(2, "No such file", "/a/b"), WRONG_INPUT, ["name: /a/b: No such file"]),
        (KeyboardInterrupt(), INTERRUPTED, ["interrupted"]),
    ],
)  # fmt: skip
def test_an_expected_error_is_reported_without_a_traceback(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, lines: list[str]
) -> None:
    assert run_reporting(raising(error), "name", reads_given_files=True) == status
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize(
    ("error", "reads_given_files"),
    [
        (OSError("no file in it"), True),
        (OSError(errno.ESTALE, "Stale file handle", "/runs/demo"), False),  # a node's start is tried again then
        (RuntimeError("why"), False),
    ],
)
def test_an_unexpected_error_is_logged_in_full(
    caplog: pytest.LogCaptureFixture, error: Exception, reads_given_files: bool
) -> None:
    assert run_reporting(raising(error), reads_given_files=reads_given_files) == FAILED
    assert f"{type(error).__name__}: {error}" in caplog.text
    assert "Traceback (most recent call last)" in caplog.text


def test_a_librarys_value_error_is_no_mistake_of_the_user(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "_list", library_error)
    assert __main__.main(["recipes"]) == FAILED
    assert "ValueError: operands could not be broadcast together" in caplog.text
    assert "in library_error" in caplog.text
    assert "error: operands" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "written", "logged"),
    [
        (UserError("data.train_file = x: no rows"), "data.train_file = x: no rows", ""),
        (ValueError("operands could not be broadcast"), "", "in raise_it"),
    ],
)
@pytest.mark.parametrize(("role", "part"), [(collect, "_until_terminated"), (serve, "_watch")])
def test_a_roles_unexpected_error_keeps_its_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    role: object,
    part: str,
    error: Exception,
    written: str,
    logged: str,
) -> None:
    def raise_it(*_: object) -> None:
        raise error

    monkeypatch.setattr(role, part, raise_it)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("sys.setswitchinterval", lambda _: None)
    assert role.run(run_config(tmp_path), 0) == (WRONG_INPUT if written else FAILED)  # type: ignore[attr-defined]
    name = role.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    assert (f"{name}: {written}\n" in capsys.readouterr().err) == bool(written)
    assert ("Traceback" in caplog.text) == bool(logged)
    assert logged in caplog.text


def test_a_user_error_comes_through_a_pipe_as_it_was() -> None:
    error = pickle.loads(pickle.dumps(UserError(["one", "two"])))
    assert (type(error), error.problems, str(error)) == (UserError, ["one", "two"], "one\ntwo")


def failed(role: str, log: Path, folder: Path) -> list[str]:
    failure = Failure(role, "failed with exit status 1", log, 0, first_rank_failure(folder))
    return closing_lines(Outcome(FAILED, [failure]))[1:]


def fail_ranks(monkeypatch: pytest.MonkeyPatch, folder: Path, *failures: tuple[int, Exception]) -> None:
    """These ranks fail in this order."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    times = iter(range(1, 10))
    monkeypatch.setattr(rank_failures.time, "time_ns", lambda: next(times))
    for rank, error in failures:
        try:
            raise error
        except Exception as raised:
            write_rank_failure(raised, rank)


def test_of_many_ranks_the_one_that_failed_first_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    fail_ranks(monkeypatch, tmp_path, (2, closed), (3, TypeError("no such layer")), (0, KeyError("later")))
    lines = failed("train", tmp_path / "train.log", tmp_path)
    assert lines[0].startswith("  | rank 3 on ")
    assert lines[0].endswith(" failed first:")
    assert lines[1] == "  | Traceback (most recent call last):"
    assert any("in fail_ranks" in line for line in lines)
    assert lines[-1] == "  | TypeError: no such layer"


def test_what_all_ranks_say_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = errors.RunFailed("the gradient was not finite")
    fail_ranks(monkeypatch, tmp_path, (1, error), (0, error))
    (tmp_path / "train.log").write_text(f"loading\ntrain: {error}\nW chatter\ntrain: {error}\n")
    assert failed("train", tmp_path / "train.log", tmp_path) == [f"  | train: {error}"]


def test_without_a_cause_no_rank_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_ranks(monkeypatch, tmp_path, (0, RuntimeError("Connection reset by peer")))
    (tmp_path / "rank-9.json").write_text("{")
    assert first_rank_failure(tmp_path) is None
    assert first_rank_failure(tmp_path / "none") is None
    monkeypatch.delenv(FOLDER_VARIABLE)
    write_rank_failure(RuntimeError("nobody asks"), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.json", "rank-9.json"]
