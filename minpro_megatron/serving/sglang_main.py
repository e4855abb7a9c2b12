"""Starts SGLang's own server program with two settings that its command line does not have.

    python -m minpro_megatron.serving.sglang_main --model-path ... (the arguments of sglang.launch_server)

The process ends with its parent, whatever ends the parent, so that no server outlives the run. On a CPU its
scheduler and detokenizer are forked: SGLang asks for `spawn`, where each of the three processes spends
about ten seconds of processor time importing the same modules. Nothing is initialised before the fork that
could not be copied; with CUDA that does not hold, and SGLang's choice stays.
"""

import ctypes
import multiprocessing
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call above
        sys.exit(1)


def _fork_instead_of_spawn() -> None:
    set_start_method = multiprocessing.set_start_method

    def choose_fork(method: str | None, force: bool = False) -> None:
        set_start_method("fork", force=force)

    multiprocessing.set_start_method = choose_fork


def main() -> None:
    """Run sglang.launch_server in this process."""
    _end_with_parent()
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        _fork_instead_of_spawn()
    runpy.run_module("sglang.launch_server", run_name="__main__")


if __name__ == "__main__":
    main()
