"""Runs one piece of untrusted Python code, isolated from this machine: `python -I -S -B sandbox_process.py`.

Run as a file, so that it starts quickly and imports nothing of this package. Reads a JSON object from standard input:
`{"code", "isolated", "folder", "python", "visible", "timeout_s", "memory_bytes", "processes", "file_bytes",
"output_bytes"}`. If this process is killed, the caller removes what it leaves in `folder`. Writes one to standard
output: `{"ended", "status", "output"}`, where `ended` is "exit", "timeout", "output" (too much of it) or "unavailable"
(the isolation is not possible here; `output` says why).

Isolated code runs in Linux namespaces of its own (user, mounts, network, processes, IPC, host name):

- it sees the folders in `visible`, read-only, and an empty folder in memory, where it starts; nothing else;
- it has no network interface, no capability, and no other process to see or to signal;
- when it ends, or is ended, the kernel ends all processes that it has started.

This process ends with its parent, and the code with this process, also by SIGKILL. The code itself is not process 1 of
its namespaces: it could refuse the signal that the kernel sends at the end of a parent (PR_SET_PDEATHSIG), and live on.
Process 1 is a copy of this program, which the code can neither trace nor signal.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_MS_BIND, _MS_REC, _MS_PRIVATE, _MS_NOSUID, _MS_NODEV = 4096, 16384, 1 << 18, 2, 4
_MNT_DETACH, _AT_FDCWD, _AT_RECURSIVE = 2, -100, 0x8000
_MOUNT_ATTR_READ_ONLY, _MOUNT_ATTR_NOSUID = 1, 2
_MOUNT_SETATTR = 442  # of all architectures
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
# inside the namespaces
_ROOT, _USER = 0, 1000
# Outside, for a run that is started by root: limits of processes do not apply to root.
_NOBODY = 65534
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64")
_WORK = "/tool-work"  # where the code runs; no folder that is shown has this name
# Settings of the namespaces: no namespaces inside these ones, and nothing of System V (shared memory, messages and
# semaphores), whose memory no limit of a process counts.
_DENIED = {"user/max_user_namespaces": "0", "kernel/shmmni": "0", "kernel/msgmni": "0", "kernel/sem": "0 0 0 0"}
_LOOK_S = 0.05
# The code gives way to the collector, which all rollouts wait for; the process that ends it at its limits does not.
_NICE = 10

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    _end_with_parent()
    request = json.load(sys.stdin)
    try:
        answer = _run(request)
    except OSError as error:
        answer = {"ended": "unavailable", "status": 0, "output": _reason(error)}
    json.dump(answer, sys.stdout)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    """Starts the code, and ends it at the limits of time and output."""
    output, writes_output = os.pipe()
    problem, writes_problem = os.pipe()
    # What the code sees is mounted on it; without isolation the code works in it.
    folder = tempfile.mkdtemp(prefix="tool-", dir=request["folder"])
    try:
        start = _start_isolated if request["isolated"] else _start_here
        child = start(request, folder, writes_output, writes_problem)
        os.close(writes_output)
        os.close(writes_problem)
        with os.fdopen(problem, "rb") as file:
            found = file.read()  # ends when the code starts
        if found:
            os.waitpid(child, 0)
            return {"ended": "unavailable", "status": 0, "output": found.decode(errors="replace")}
        return _watched(child, output, request)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watched(child: int, output: int, request: dict[str, Any]) -> dict[str, Any]:
    deadline, limit = time.monotonic() + request["timeout_s"], request["output_bytes"]
    data, ended, status = bytearray(), "exit", None
    while status is None:
        if time.monotonic() > deadline:
            ended = "timeout"
        elif len(data) > limit:
            ended = "output"
        if ended != "exit":
            _end(child)
            status = os.waitpid(child, 0)[1]
            break
        if select.select([output], [], [], _LOOK_S)[0]:
            piece = os.read(output, 65536)
            data += piece
            if not piece:  # closed, perhaps before its end
                time.sleep(_LOOK_S)
        pid, found = os.waitpid(child, os.WNOHANG)
        status = found if pid else None
    _end(child)  # what it has left behind, without isolation
    while len(data) <= limit and select.select([output], [], [], 0)[0] and (piece := os.read(output, 65536)):
        data += piece
    if ended == "exit" and len(data) > limit:
        ended = "output"
    return {
        "ended": ended,
        "status": os.waitstatus_to_exitcode(status),
        "output": bytes(data[:limit]).decode(errors="replace"),
    }


def _end(child: int) -> None:
    """Ends the code's group of processes; the end of the process that entered the namespaces ends all inside them."""
    for end in (os.killpg, os.kill):
        try:
            end(child, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _start_here(request: dict[str, Any], folder: str, output: int, problem: int) -> int:
    """The process that runs the code with limits, but without isolation."""
    child = os.fork()
    if child:
        return child
    with _Reported(problem):
        os.setsid()
        _end_with_parent()
        os.chdir(folder)
        _limit(request, processes=None)
        _execute(request, folder, output)


def _start_isolated(request: dict[str, Any], folder: str, output: int, problem: int) -> int:
    """The process that enters new namespaces, and waits for process 1 in them, which starts the code."""
    is_inside, says_inside = os.pipe()
    is_mapped, says_mapped = os.pipe()
    child = os.fork()
    if child:
        os.close(says_inside)
        try:
            if os.read(is_inside, 1):  # else the child has failed, and says why
                _step("users of its own", lambda: _map_users(child))
        finally:
            os.close(says_mapped)
            os.close(is_inside)
            os.close(is_mapped)
        return child
    with _Reported(problem):
        os.close(says_mapped)
        os.setsid()
        _end_with_parent()
        flags = (
            os.CLONE_NEWUSER | os.CLONE_NEWNS | os.CLONE_NEWNET | os.CLONE_NEWPID | os.CLONE_NEWIPC | os.CLONE_NEWUTS
        )
        _step("new namespaces (user namespaces may be disabled on this machine)", lambda: os.unshare(flags))
        os.write(says_inside, b"1")
        os.close(says_inside)
        os.read(is_mapped, 1)  # ends when the users are mapped
        os.setresgid(_ROOT, _ROOT, _ROOT)
        os.setresuid(_ROOT, _ROOT, _ROOT)
        _end_with_parent()  # a change of user clears it
        first = os.fork()
        if first:
            os.close(problem)
            os.close(output)
            os._exit(_exit_code(os.waitpid(first, 0)[1]))
        os.setsid()
        _enter(request, folder)
        _drop_privileges()
        _refuse_the_code()
        code = os.fork()
        if code:
            os.close(problem)
            os.close(output)
            os._exit(_exit_code(_status_of(code)))
        os.setsid()
        _limit(request, request["processes"] + 1)  # process 1 may belong to the same user
        _execute(request, _WORK, output)


def _refuse_the_code() -> None:
    """Before process 1 starts the code: the code cannot trace it, and the kernel drops all signals that it sends."""
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # dropped, unless process 1 has a handler, as Python has for this one


def _status_of(code: int) -> int:
    """The status of the code when it has ended. Process 1 is also the parent of all processes that lose their own."""
    while True:
        pid, status = os.wait()
        if pid == code:
            return status


def _map_users(child: int) -> None:
    """Gives the child users of its own. Only this process may, because it is not in the child's namespace."""
    uid, gid = os.getuid(), os.getgid()
    lines = {"uid_map": f"{_ROOT} {uid} 1\n", "gid_map": f"{_ROOT} {gid} 1\n"}
    if uid == 0:
        lines = {name: line + f"{_USER} {_NOBODY} 1\n" for name, line in lines.items()}
    else:
        _write(f"/proc/{child}/setgroups", "deny")
    for name, text in lines.items():
        _write(f"/proc/{child}/{name}", text)


def _enter(request: dict[str, Any], folder: str) -> None:
    """Replaces all that is seen of the file system."""
    os.umask(0o022)  # the code may have another user, who must be able to enter the folders that are made here
    for name, value in _DENIED.items():
        with contextlib.suppress(OSError):  # /proc/sys may be read-only, or the kernel older than 5.19
            _write(f"/proc/sys/{name}", value)
    _step("private mounts", lambda: _mount(None, "/", None, _MS_REC | _MS_PRIVATE))
    _step("a folder in memory", lambda: _mount("tmpfs", folder, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755"))
    # an outer folder comes before those inside it, which it shows too
    for path in sorted({*_SYSTEM, *request["visible"]}, key=len):
        _show(path, folder)
    os.makedirs(f"{folder}/dev")
    for device in _DEVICES:
        os.close(os.open(f"{folder}{device}", os.O_CREAT))
        _mount(device, f"{folder}{device}", None, _MS_BIND)
    work = f"{folder}{_WORK}"
    os.mkdir(work)
    options = f"size={request['file_bytes']},nr_inodes=4096,mode=1777"
    _step("a working folder in memory", lambda: _mount("tmpfs", work, "tmpfs", _MS_NOSUID | _MS_NODEV, options))
    if not os.path.lexists(f"{folder}/tmp"):
        os.symlink(_WORK, f"{folder}/tmp")
    _step("a read-only view (Linux 5.12)", lambda: _read_only(folder, recursive=False))
    os.chdir(folder)
    _step("another root", _pivot)
    os.chdir(_WORK)


def _show(path: str, folder: str) -> None:
    """Shows a folder of the machine, read-only, at the same place; links are copied."""
    if not os.path.lexists(path) or os.path.lexists(folder + path):
        return
    if os.path.islink(path):
        os.symlink(os.readlink(path), folder + path)
        return
    os.makedirs(folder + path)
    _step(f"a view of {path}", lambda: _mount(path, folder + path, None, _MS_BIND | _MS_REC))
    _step(f"a read-only view of {path} (Linux 5.12)", lambda: _read_only(folder + path, recursive=True))


def _pivot() -> None:
    _checked(_libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."))
    _checked(_libc.umount2(b".", _MNT_DETACH))


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "users")]


def _read_only(path: str, recursive: bool) -> None:
    attributes = _MountAttributes(_MOUNT_ATTR_READ_ONLY | _MOUNT_ATTR_NOSUID, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    size = ctypes.sizeof(attributes)
    _checked(_libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, ctypes.byref(attributes), size))


def _drop_privileges() -> None:
    """Leaves no capability, in these namespaces either, and no way to get one."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    with contextlib.suppress(OSError):  # not started by root: only one user is mapped
        os.setresgid(_USER, _USER, _USER)
        os.setresuid(_USER, _USER, _USER)
    _end_with_parent()


def _limit(request: dict[str, Any], processes: int | None) -> None:
    seconds = int(request["timeout_s"]) + 1
    limits = {
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    os.nice(_NICE)


def _execute(request: dict[str, Any], folder: str, output: int) -> NoReturn:
    """Replaces this process by Python with the code."""
    path = f"{folder}/main.py"
    # "surrogatepass": of a text that is no Unicode, Python itself shall complain
    _write(path, request["code"], errors="surrogatepass")
    nothing = os.open("/dev/null", os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    environment = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    os.execve(request["python"], [request["python"], "-I", "-B", "-u", "-X", "utf8", path], environment)


class _Reported:
    """Inside it an error is written to the pipe, and ends this process. The pipe is closed when the code starts."""

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> NoReturn:
        os.write(self._pipe, (_reason(error) if error else "it did not start").encode())
        os._exit(1)


def _step(what: str, work: Callable[[], object]) -> None:
    try:
        work()
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror}") from None


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or f"{type(error).__name__}: {error}"


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    _checked(_libc.mount(*texts, ctypes.c_ulong(flags), options.encode() or None))


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _write(path: str, text: str, errors: str = "strict") -> None:
    with open(path, "w", encoding="utf-8", errors=errors) as file:
        file.write(text)


def _end_with_parent() -> None:
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))


if __name__ == "__main__":
    main()
