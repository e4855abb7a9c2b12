"""Of a failed role's log, the lines that explain the failure are shown."""

import subprocess
import sys

from minpro_megatron.monitor.logs import explanation

_ELASTIC = "6985 torch/distributed/elastic/multiprocessing/api.py"
TORCHRUN = f"""\
W0112 10:01:04.000000 6985 torch/distributed/run.py:852] *****************************************
W0112 10:01:04.100000 {_ELASTIC}:900] Sending process 7 closing signal SIGTERM
E0112 10:01:04.475000 {_ELASTIC}:1002] failed (exitcode: {{status}}) local_rank: 0 (pid: 7190) of binary: python
Traceback (most recent call last):
  File "run.py", line 1142, in <module>
    main()
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
train FAILED
"""


def explained(tmp_path, text: str, max_lines: int = 20) -> list[str]:
    (tmp_path / "role.log").write_text(text)
    return explanation(tmp_path / "role.log", max_lines)


def test_a_missing_or_empty_log_explains_nothing(tmp_path):
    assert explanation(tmp_path / "role.log") == []
    assert explained(tmp_path, "") == []


def test_a_former_starts_messages_explain_nothing(tmp_path):
    log = tmp_path / "role.log"
    log.write_text("Traceback (most recent call last):\n  File x\nValueError: of the former start\n")
    start = log.stat().st_size
    assert explanation(log, start=start) == []
    with log.open("a") as file:
        file.write("Killed\n")
    assert explanation(log, start=start) == ["Killed"]
    assert any("former start" in line for line in explanation(log))


def test_a_real_traceback_is_found(tmp_path):
    program = "print('starting')\ndef f():\n    raise ValueError('why\\nin two lines')\nf()"
    ended = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True)
    lines = explained(tmp_path, ended.stdout + ended.stderr)
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == ["ValueError: why", "in two lines"]


def test_of_a_long_traceback_the_innermost_frames_and_the_message_remain(tmp_path):
    frames = "".join(f'  File "{index}.py", line 1, in f\n    g()\n' for index in range(50))
    lines = explained(tmp_path, f"Traceback (most recent call last):\n{frames}KeyError: 'x'\n", max_lines=10)
    assert len(lines) == 10
    assert lines[1] == "  ... 93 lines omitted ..."
    assert lines[-3:] == ['  File "49.py", line 1, in f', "    g()", "KeyError: 'x'"]


def test_a_ranks_traceback_is_separated_from_the_other_ranks_and_torchruns(tmp_path):
    text = (
        "[rank1]: Traceback (most recent call last):\n[rank0]: Traceback (most recent call last):\n"
        '[rank1]:   File "a.py", line 1, in f\n[rank0]:   File "b.py", line 1, in g\n'
        "[rank1]: ValueError: the cause\n[rank0]: RuntimeError: Connection closed by peer [127.0.0.1]:1234\n"
    ) + TORCHRUN.format(status=1)
    lines = explained(tmp_path, text)
    assert lines[:3] == [
        "[rank1]: Traceback (most recent call last):",
        '[rank1]:   File "a.py", line 1, in f',
        "[rank1]: ValueError: the cause",
    ]
    assert "failed (exitcode: 1) local_rank: 0" in lines[-1]
    assert not any("ChildFailedError" in line or "closing signal" in line for line in lines)


def test_a_rank_that_was_killed_is_named(tmp_path):
    lines = explained(tmp_path, "step 3\n" + TORCHRUN.format(status=-9))
    assert lines[0] == "step 3"
    assert "failed (exitcode: -9) local_rank: 0 (pid: 7190)" in lines[-1]


def test_a_rank_that_said_why_in_one_line_is_heard(tmp_path):
    text = (
        "train: the collector does not answer\n"
        "[rank1]: Traceback (most recent call last):\n"
        "[rank1]: RuntimeError: Connection reset by peer\n"
    )
    lines = explained(tmp_path, text + TORCHRUN.format(status=1))
    assert lines[0] == "train: the collector does not answer"
    assert len(lines) == 2


def test_what_the_role_gave_as_its_reason_is_shown_alone(tmp_path):
    text = "2026-01-01 serve INFO starting\nValueError: of a library, handled\n" * 30
    text += "serve: server 0: not ready after server.start_timeout_s = 300 s\nserve:   loading shards 3/4\n"
    (tmp_path / "role.log").write_text(text + "2026-01-01 serve INFO 1 servers stopped\n")
    assert explanation(tmp_path / "role.log", role="serve") == [
        "serve: server 0: not ready after server.start_timeout_s = 300 s",
        "serve:   loading shards 3/4",
    ]
    assert len(explanation(tmp_path / "role.log", role="train")) == 20


def test_a_traceback_that_the_role_outlived_does_not_hide_the_end(tmp_path):
    text = "Traceback (most recent call last):\nOSError: handled\n"
    text += "".join(f"2026-01-01 INFO line {index}\n" for index in range(50)) + "2026-01-01 INFO terminated\n"
    lines = explained(tmp_path, text)
    assert lines[:3] == ["Traceback (most recent call last):", "OSError: handled", "..."]
    assert lines[-1] == "2026-01-01 INFO terminated"


def test_without_a_traceback_the_last_error_and_the_end_are_shown(tmp_path):
    text = "".join(f"line {index}\n" for index in range(100))
    lines = explained(tmp_path, text + "ERROR out of memory\n" + text)
    assert lines[0] == "ERROR out of memory"
    assert lines[-1] == "line 99"
    assert len(lines) == 21
    assert explained(tmp_path, text) == [f"line {index}" for index in range(80, 100)]


def test_warnings_explain_nothing(tmp_path):
    text = "a.py:12: UserWarning: no Apex\n  warnings.warn(\nloading\n  indented\nb.py:3: FutureWarning: x\n  f()\n"
    text += "W1121 10:58:22.784000 14501 torch/utils/cpp_extension.py:183] No CUDA runtime is found\n"
    assert explained(tmp_path, text) == ["loading", "  indented"]
    assert explained(tmp_path, "a.py:12: UserWarning: no Apex\n  warnings.warn(\n") == []


def test_a_huge_log_is_read_from_its_end_and_bars_are_shown_once(tmp_path):
    (tmp_path / "role.log").write_bytes(b"x" * 10**7 + b"\n 10%\r 50%\r100%\n\xff broken\n")
    assert explanation(tmp_path / "role.log")[-2:] == ["100%", "\ufffd broken"]
