"""The Python tool runs what a policy may write: honest code, and code that attacks the machine that runs it."""

import asyncio
import os
import signal
import socket
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from minpro_megatron.config.environment import PythonToolConfig
from minpro_megatron.environments.environment import Answer, EpisodeTurn
from minpro_megatron.environments.python_tool import sandbox
from minpro_megatron.environments.python_tool.tool import PythonTool
from minpro_megatron.errors import UserError
from minpro_megatron.records import Prompt

# The machine of the tests may be busy: limits of time that no test needs are long.
SETTINGS = PythonToolConfig(timeout_s=60, memory_mb=512, max_processes=8, max_file_mb=2, max_output_chars=2000)
ISOLATED = sandbox.isolation_problem(SETTINGS)
needs_isolation = pytest.mark.skipif(bool(ISOLATED), reason=f"code cannot be isolated here: {ISOLATED}")


def turn_of(*codes: str) -> EpisodeTurn:
    text = "\n".join(f"```python\n{code}\n```" for code in codes)
    return EpisodeTurn(Prompt(id="p", source="s", text="", answer=""), 0, 1, text)


def answer_to(code: str, **settings: object) -> Answer:
    async def main() -> Answer | None:
        async with PythonTool(SETTINGS.model_copy(update=settings)) as tool:
            return await tool.answer(turn_of(code))

    answer = asyncio.run(main())
    assert answer is not None
    return answer


def left_processes() -> list[str]:
    """The processes of tools that are still there, after a moment for the kernel to end them."""
    deadline = time.monotonic() + 20
    while True:
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        found = [line for line in lines if "sandbox_process" in line or "/tool-work/" in line or "/tool-" in line]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


@needs_isolation
def test_code_is_run_with_the_libraries_of_the_environment() -> None:
    answer = answer_to("import numpy\nprint(numpy.arange(4).sum())\nimport sys\nprint('late', file=sys.stderr)")
    assert answer == Answer("6\nlate", tool_calls=1)


@pytest.mark.parametrize("kind", [pytest.param("isolated", marks=needs_isolation), "none"])
def test_code_has_a_lower_priority_than_the_collector_and_cannot_raise_it(kind: str) -> None:
    """Root may, without isolation."""
    raised = "try:\n    os.nice(-1)\n    print('raised')\nexcept OSError:\n    print('refused')"
    answer = answer_to(f"import os\nprint(os.nice(0))\n{raised}", sandbox=kind)
    own, may_raise = os.nice(0), kind == "none" and os.geteuid() == 0
    assert answer.text == f"{min(own + 10, 19)}\n{'raised' if may_raise else 'refused'}"


@needs_isolation
def test_calls_do_not_see_each_other() -> None:
    async def main() -> Answer | None:
        async with PythonTool(SETTINGS.model_copy(update={"max_calls_per_turn": 2})) as tool:
            write = "open('kept', 'w').write('1')\nprint('written')"
            return await tool.answer(turn_of(write, "import os\nprint(os.listdir('.'))", "print('a third call')"))

    assert asyncio.run(main()) == Answer("written\n['main.py']", tool_calls=2)


def test_a_turn_without_a_call_ends_the_episode() -> None:
    async def main() -> Answer | None:
        async with PythonTool(SETTINGS.model_copy(update={"sandbox": "none"})) as tool:
            return await tool.answer(EpisodeTurn(Prompt(id="p", source="s", text="", answer=""), 0, 1, "it is 4"))

    assert asyncio.run(main()) is None


FORK_BOMB = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
MEMORY_BOMB = "kept = []\nwhile True: kept.append(bytearray(1 << 24))"
ENDLESS = "while True: print('x' * 1000)"
SILENT = "while True: pass"
DISK = "open('big', 'wb').write(bytes(8 << 20))"


@needs_isolation
@pytest.mark.parametrize(
    ("code", "settings", "problem"),
    [
        (FORK_BOMB, {"timeout_s": 1}, "the code was ended after the time limit of 1 s"),
        (MEMORY_BOMB, {}, "the memory limit of 512 MiB was reached"),
        (ENDLESS, {}, "the code was ended because it printed more than 2000 characters"),
        (SILENT, {"timeout_s": 1}, "the code was ended after the time limit of 1 s"),
        (DISK, {}, "the code ended with status 1"),
        ("import os\nos.abort()", {}, "the code ended with status 134"),
        ("raise ValueError('mine')", {}, "the code ended with status 1"),
        ("import sys\nsys.exit(3)", {}, "the code ended with status 3"),
        (
            "import os\nprint(os.open('/dev/null', 0) and [os.dup(0) for _ in range(100)])",
            {},
            "the code ended with status 1",
        ),
    ],
)
def test_a_call_that_takes_too_much_is_ended_and_told_so(code: str, settings: dict, problem: str) -> None:
    answer = answer_to(code, **settings)
    assert answer.problem == problem
    assert answer.text.endswith(f"error: {problem}")
    assert len(answer.text) < 2500
    assert left_processes() == []


@needs_isolation
def test_code_sees_nothing_of_the_run(tmp_path: Path) -> None:
    """Neither the journal nor the collector's environment, nor any other file than Python's."""
    (tmp_path / "journal.sqlite").write_text("rollouts")
    os.environ["EPISODES_TEST_KEY"] = "a secret"
    try:
        answer = answer_to(
            f"import os\nprint(os.path.exists({str(tmp_path)!r}), sorted(os.environ))\n"
            "for path in ('/proc', '/sys', '/etc', '/home', '/var'):\n    assert not os.path.exists(path), path\n"
            f"print([name for name in os.listdir('/') if name not in {sorted(allowed_roots())}])\n"
            "for path in ('/usr/mine', '/mine', os.path.dirname(os.__file__) + '/mine'):\n"
            "    try: open(path, 'w')\n    except OSError as error: print(error.strerror)\n"
        )
    finally:
        del os.environ["EPISODES_TEST_KEY"]
    seen, roots, *refused = answer.text.splitlines()
    assert seen.startswith("False")
    assert "EPISODES_TEST_KEY" not in seen
    assert roots == "[]"
    assert refused == ["Read-only file system"] * 3


def allowed_roots() -> set[str]:
    shown = {Path(path).parts[1] for path in (sandbox.sys.prefix, sandbox.sys.base_prefix)}
    return shown | {"usr", "bin", "lib", "lib64", "dev", "tmp", "tool-work"}


@needs_isolation
def test_code_reaches_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        answer = answer_to(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=5)")
    assert "Network is unreachable" in answer.text
    assert answer.problem == "the code ended with status 1"


@needs_isolation
def test_code_can_end_no_process_but_its_own() -> None:
    answer = answer_to(
        "import os, signal\n"
        f"for pid in (os.getppid(), -1, 3, {os.getpid()}):\n"
        "    try: os.kill(pid, signal.SIGKILL)\n"
        "    except OSError: pass\n"
        "print('still here', os.getpid(), os.getppid())"
    )
    assert answer == Answer("still here 2 1", tool_calls=1)


@needs_isolation
def test_code_can_neither_signal_nor_trace_the_process_that_ends_it() -> None:
    answer = answer_to(
        "import ctypes, os, signal, time\n"
        "for one in (signal.SIGINT, signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL): os.kill(1, one)\n"
        "time.sleep(0.3)\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno())"  # PTRACE_ATTACH, EPERM
    )
    assert answer == Answer("-1 1", tool_calls=1)


@needs_isolation
def test_code_has_no_privileges_and_gets_none() -> None:
    answer = answer_to(
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.mount(b'none', b'/tool-work', b'tmpfs', 0, None), ctypes.get_errno())\n"
        "try: os.unshare(os.CLONE_NEWUSER)\n"
        "except OSError as error: print('no namespaces')\n"
        "try: os.chroot('/tool-work')\n"
        "except OSError as error: print('no chroot')\n"
    )
    assert answer.text.splitlines() == ["-1 1", "no namespaces", "no chroot"]


@needs_isolation
def test_what_code_leaves_running_ends_with_it() -> None:
    began = time.monotonic()
    answer = answer_to("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)\nprint('left')")
    assert answer == Answer("left", tool_calls=1)
    assert time.monotonic() - began < 60
    assert left_processes() == []


# PR_SET_PDEATHSIG: the kernel is to send no signal at the end of the parent.
OUTLIVE = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\ntime.sleep(600)"


@needs_isolation
def test_code_that_refuses_to_end_with_its_parent_ends_at_the_limit_of_time() -> None:
    assert answer_to(OUTLIVE, timeout_s=1).problem == "the code was ended after the time limit of 1 s"
    assert left_processes() == []


@needs_isolation
def test_code_ends_with_the_process_that_waits_for_it() -> None:
    """A cancelled call, as when the group moves to another server; kill -9 of the process between them."""

    async def main() -> None:
        async with PythonTool(SETTINGS) as tool:
            for end in ("cancel", "kill"):
                task = asyncio.create_task(tool.answer(turn_of(OUTLIVE)))
                while not (
                    found := [p for p in psutil.Process().children() if "sandbox_process" in " ".join(p.cmdline())]
                ):
                    await asyncio.sleep(0.05)
                await asyncio.sleep(1)
                if end == "cancel":
                    task.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await task
                else:
                    found[0].send_signal(signal.SIGKILL)
                    answer = await task
                    assert answer is not None
                    assert answer.problem.startswith("not run: the process that runs the code failed")
                assert await asyncio.to_thread(left_processes) == []

    asyncio.run(main())


@needs_isolation
@pytest.mark.skipif(not os.access("/proc/sys/kernel/shmmni", os.W_OK), reason="/proc/sys is read-only")
def test_code_that_no_limit_of_a_process_counts_is_refused() -> None:
    """Segments of System V stay when a process has detached them, and its semaphores are memory of the kernel (65 GB
    with the usual limits): a loop could fill the machine's memory."""
    answer = answer_to(
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.shmget(0, 1 << 20, 0o1600), libc.msgget(0, 0o1600), libc.semget(0, 32000, 0o1600))"
    )
    assert answer == Answer("-1 -1 -1", tool_calls=1)


@pytest.mark.parametrize("sandbox_kind", [pytest.param("isolated", marks=needs_isolation), "none"])
def test_code_that_is_no_unicode_is_a_fault_of_the_code(sandbox_kind: str) -> None:
    async def main() -> Answer | None:
        async with PythonTool(SETTINGS.model_copy(update={"sandbox": sandbox_kind})) as tool:
            call = r'{"name": "code_interpreter", "arguments": {"code": "print(1) # \ud800"}}'
            return await tool.answer(EpisodeTurn(Prompt(id="p", source="s", text="", answer=""), 0, 1, call))

    answer = asyncio.run(main())
    assert answer is not None
    assert answer.problem == "the code ended with status 1"
    assert "SyntaxError" in answer.text


@needs_isolation
def test_a_strict_umask_of_the_collector_does_not_lock_the_code_out() -> None:
    before = os.umask(0o077)
    try:
        assert answer_to("print(1)") == Answer("1", tool_calls=1)
    finally:
        os.umask(before)


@pytest.mark.parametrize("sandbox_kind", [pytest.param("isolated", marks=needs_isolation), "none"])
def test_a_cancelled_call_leaves_no_files(sandbox_kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def found() -> set[str]:
        return {str(path) for path in (*tmp_path.glob("*"), *Path("/tmp").glob("tool-*"))}

    before = found()

    async def main() -> None:
        async with PythonTool(SETTINGS.model_copy(update={"sandbox": sandbox_kind})) as tool:
            task = asyncio.create_task(tool.answer(turn_of("import time\nopen('big', 'w')\ntime.sleep(600)")))
            while not list(tmp_path.glob("*/tool-*")) and not found() - before:
                await asyncio.sleep(0.05)
            await asyncio.sleep(1)
            task.cancel()
            await asyncio.wait({task})

    asyncio.run(main())
    assert found() == before


def test_a_process_that_cannot_be_started_is_told_to_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the collector can open no more files: an error would exclude the group from training."""
    monkeypatch.setattr(sandbox, "_command", lambda: ["/no/such/program"])
    answer = answer_to("print(1)", sandbox="none")
    assert answer.text == "error: the tool is not available at this time"
    assert answer.problem.startswith("not run: no process could be started: [Errno 2]")


def test_without_isolation_a_run_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "no_namespaces.py"
    program.write_text(
        "import os, sys\n"
        "def unshare(flags): raise PermissionError(1, 'Operation not permitted')\n"
        "os.unshare = unshare\n"
        f"sys.argv = [{str(sandbox._PROGRAM)!r}]\n"
        f"exec(compile(open({str(sandbox._PROGRAM)!r}).read(), 'sandbox_process', 'exec'))\n"
    )
    monkeypatch.setattr(sandbox, "_PROGRAM", program)
    with pytest.raises(
        UserError, match=r"cannot be isolated on this machine: new namespaces .*not permitted; allow user"
    ):
        answer_to("print(1)")
    assert answer_to("print(1)", sandbox="none") == Answer("1", tool_calls=1)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import time\ntime.sleep(600)", "the code was ended after the time limit of 1 s"),
        ("import os\nif os.fork() == 0:\n    import time\n    time.sleep(600)\nprint('left')", ""),
        (ENDLESS, "the code was ended because it printed more than 2000 characters"),
    ],
)
def test_without_a_sandbox_limits_hold(code: str, problem: str) -> None:
    assert answer_to(code, sandbox="none", timeout_s=1 if "time limit" in problem else 60).problem == problem
    assert left_processes() == []
