"""Ends processes of a run at an exact point of their work.

Python imports a module of this name at the start of every process that finds it on its path. The tests put this folder
on PYTHONPATH and say in CRASH_POINT (a `tests.e2e.crashes.CrashPoint` as JSON) which call of which function in which
process it is, and who is to die. A point is reached once in a run: the file `marker` says that it was.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

FULL = 28  # ENOSPC


class _Point:
    """The calls counted so far, and what happens when it is the one."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self._asked = asked
        self._armed = not asked["within"]
        self._num_outer = self._num_calls = 0

    def modules(self) -> dict[str, list[tuple[str, Callable]]]:
        """By module what is to be wrapped in it: name, wrapper."""
        found: dict[str, list[tuple[str, Callable]]] = {}
        for where, wrapper in ((self._asked["within"], self._around), (self._asked["at"], self._at)):
            if where:
                module, _, name = where.partition(":")
                found.setdefault(module, []).append((name, wrapper))
        return found

    def _around(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self._num_outer += 1
            self._armed = self._armed or self._num_outer == self._asked["within_call"]
            return function(*arguments, **named)  # of a coroutine function: the coroutine

        return call

    def _at(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            number = self._begin()
            result = function(*arguments, **named)
            self._end(number)
            return result

        @functools.wraps(function)
        async def awaited(*arguments: Any, **named: Any) -> Any:
            number = self._begin()
            result = await function(*arguments, **named)
            self._end(number)
            return result

        return awaited if inspect.iscoroutinefunction(function) else call

    def _begin(self) -> int:
        self._num_calls += self._armed
        self._act_if(self._num_calls, "before")
        return self._num_calls

    def _end(self, number: int) -> None:
        self._act_if(number, "after")

    def _act_if(self, number: int, moment: str) -> None:
        if not self._armed or (number, moment) != (self._asked["call"], self._asked["moment"]):
            return
        try:
            os.close(os.open(self._asked["marker"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        {"kill": self._kill, "limit": self._limit, "fill": self._fill}[self._asked["action"]]()

    def _kill(self) -> None:
        number = signal.Signals[self._asked["signal"]]
        victim = self._asked["victim"]
        if victim in ("self", "parent"):
            os.kill(os.getpid() if victim == "self" else os.getppid(), number)
            return
        import psutil

        launcher = next(process for process in psutil.Process().parents() if "launch" in process.cmdline())
        words = {"server": "--port", "train": "torch.distributed.run"}
        for process in [launcher] if victim == "launcher" else launcher.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it may be ending
                if victim == "launcher" or words.get(victim, victim) in process.cmdline():
                    process.send_signal(number)
                    return
        raise RuntimeError(f"no {victim} to kill")

    def _limit(self) -> None:
        """This process's files cannot grow beyond what `file` has now, plus half a page."""
        import resource

        size = os.path.getsize(self._asked["file"]) + 2048
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def _fill(self) -> None:
        """The file system has no room left: `file` has it all."""
        with open(self._asked["file"], "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                if error.errno != FULL:
                    raise


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps functions of modules as they are imported."""

    def __init__(self, wanted: dict[str, list[tuple[str, Callable]]]) -> None:
        self._wanted = wanted

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        if fullname not in self._wanted:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None, fullname
        assert spec.loader is not None, fullname
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            for name, wrapper in self._wanted[fullname]:
                *owners, last = name.split(".")
                owner = functools.reduce(getattr, owners, module)
                setattr(owner, last, wrapper(getattr(owner, last)))

        spec.loader.exec_module = execute_and_wrap
        return spec


def _is_meant(asked: dict[str, Any]) -> bool:
    program = "minpro_megatron.reference_engine" if asked["process"] == "server" else "minpro_megatron"
    words = sys.orig_argv
    is_process = program in words and (asked["process"] == "server" or asked["process"] in words)
    return is_process and os.environ.get("RANK", "0") == str(asked["rank"])


if "CRASH_POINT" in os.environ:
    _asked = json.loads(os.environ["CRASH_POINT"])
    if _is_meant(_asked) and not os.path.exists(_asked["marker"]):
        sys.meta_path.insert(0, _Finder(_Point(_asked).modules()))
