"""A file system without locks, for a program of its own: a library that answers every fcntl lock with ENOSYS."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

# SQLite calls fcntl, Python's fcntl.lockf too; both are the same function under two names where files are large.
_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>

static int refused(int fd, int command, void *argument, const char *name) {
    if (command == F_SETLK || command == F_SETLKW || command == F_GETLK) {
        errno = ENOSYS;
        return -1;
    }
    return ((int (*)(int, int, ...))dlsym(RTLD_NEXT, name))(fd, command, argument);
}
#define PASS(name) int name(int fd, int command, ...) { \
    va_list list; va_start(list, command); void *argument = va_arg(list, void *); va_end(list); \
    return refused(fd, command, argument, #name); }
PASS(fcntl)
PASS(fcntl64)
"""


@cache
def library_without_locks(folder: Path) -> Path:
    """For LD_PRELOAD, made in `folder`. Skips without a C compiler."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    source, library = folder / "no_locks.c", folder / "no_locks.so"
    source.write_text(_SOURCE)
    subprocess.run(["cc", "-shared", "-fPIC", "-w", str(source), "-o", str(library), "-ldl"], check=True)
    return library


def run_without_locks(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the Python program where no file can be locked. `folder`: for the library. Skips without a C compiler."""
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"LD_PRELOAD": str(library_without_locks(folder))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
