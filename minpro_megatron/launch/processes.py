"""Finds and ends processes, including those whose parent has already ended."""

import os
import time
from collections.abc import Collection

import psutil


def descendants(except_below: Collection[int] = ()) -> list[psutil.Process]:
    """All living descendants of this process except those in `except_below` and their descendants.

    Complete only after `prctl.adopt_orphans()`. Zombies are not listed.
    """
    excluded = set(except_below)
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):  # parents come before their children
        try:
            if process.pid in excluded or process.ppid() in excluded:
                excluded.add(process.pid)
            elif process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def reap_orphans(own_children: Collection[int]) -> None:
    """Collects the exit statuses of adopted children that have ended, so that no zombies remain.

    `own_children` are left to their subprocess.Popen objects, which would otherwise lose their exit status.
    """
    for child in psutil.Process().children():
        try:
            if child.pid not in own_children and child.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(child.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue


def kill_all(own_children: Collection[int], except_below: Collection[int], limit_s: float) -> list[int]:
    """SIGKILLs every descendant until there is none; returns the pids that still exist after `limit_s`.

    It lists them again after each round, because a process may start another one before it is killed.
    """
    protected = {*own_children, *except_below}
    deadline = time.monotonic() + limit_s
    while True:
        remaining = descendants(except_below)
        for process in remaining:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        reap_orphans(protected)
        if not remaining or time.monotonic() > deadline:
            return [process.pid for process in remaining]
        time.sleep(0.05)
