"""Starts SGLang's own server program with three settings that its command line does not offer.

    python -m minpro_megatron.serving.sglang_main --model-path ... (the arguments of sglang.launch_server)

The process ends with its parent, however the parent ends, so that no server outlives the run. On a CPU its
scheduler and detokenizer are forked: SGLang requests `spawn`, where each of the three processes spends
about ten seconds of processor time importing the same modules. Nothing is initialised before the fork that
cannot be copied; with CUDA this is not true, and SGLang's choice is kept. The API key comes from the environment
and is kept out of the log.
"""

import ctypes
import logging
import multiprocessing
import os
import runpy
import signal
import sys
from contextlib import suppress

# Passes the API key to this process: a command line would show it to every user of the machine.
API_KEY_VARIABLE = "MINPRO_SERVER_API_KEY"
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
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


def _take_api_key() -> None:
    key = os.environ.pop(API_KEY_VARIABLE, None)
    if key is None:
        return
    sys.argv.append(f"--api-key={key}")  # one argument: a key that begins with "-" would be taken for an option
    make_record = logging.getLogRecordFactory()

    def make_record_without_key(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        with suppress(TypeError, ValueError):  # arguments that do not fit the format: logging itself reports it
            if key in (message := record.getMessage()):  # SGLang logs all of its arguments when it starts
                record.msg, record.args = message.replace(key, "<API key>"), ()
        return record

    logging.setLogRecordFactory(make_record_without_key)


def main() -> None:
    """Run sglang.launch_server in this process."""
    end_with_parent()
    _take_api_key()
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        _fork_instead_of_spawn()
    runpy.run_module("sglang.launch_server", run_name="__main__")


if __name__ == "__main__":
    main()
