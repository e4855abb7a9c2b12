"""The two Linux process attributes that keep a run from leaving processes behind; no-ops elsewhere."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return ctypes.CDLL(None, use_errno=True).prctl


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent dies (PR_SET_CHILD_SUBREAPER).

    Without it the children of a killed role become children of init, where they can no longer be identified as ours.
    """
    prctl = _prctl()
    if prctl is not None and prctl(_PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def end_with_parent(number: signal.Signals) -> None:
    """Makes this process receive signal `number` when its parent ends, even by kill -9."""
    prctl = _prctl()
    if prctl is not None and prctl(_PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def ending_with_this_process(number: signal.Signals) -> Callable[[], None]:
    """A `preexec_fn` for subprocess: the child gets signal `number` when the calling process ends.

    This also works for programs that do not support it themselves (torchrun). The library function is looked up
    here, before the fork, so that the forked child only makes the system call. Linux ties it to the calling
    *thread*: start the child from the main thread.
    """
    prctl, parent = _prctl(), os.getpid()

    def in_child() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, number)
            if os.getppid() != parent:  # the parent ended before the call above
                os._exit(1)

    return in_child
