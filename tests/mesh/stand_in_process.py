"""Runs a function in a process of its own, in which Transformer Engine's stand-in takes its place.

megatron-core looks for Transformer Engine while it is imported, so that cannot be changed in a process that has it.
"""

import importlib
import multiprocessing
import traceback
import warnings
from typing import Any


def run_with_stand_in(function: str, *arguments: Any, deadline_s: float = 160.0) -> Any:
    """`function` ("module:name") of the arguments, whose classes must not need megatron. In it `run_mesh` works, with
    ranks forked from that process. Raises AssertionError with the traceback of what failed there."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_answer, args=(function, arguments, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(deadline_s):
            raise AssertionError(f"{function} did not finish in {deadline_s} s")
        succeeded, value = receiver.recv()
    except EOFError:
        raise AssertionError(f"{function}: its process died") from None
    finally:
        process.kill()
        process.join()
    assert succeeded, value
    return value


def _answer(function: str, arguments: tuple, sender: Any) -> None:
    warnings.simplefilter("ignore")
    from tests.mesh.transformer_engine_stand_in import install

    try:
        install()
        import torch

        import tests.mesh.preload  # noqa: F401  before the fork: once for all ranks
        from tests.mesh import harness

        torch.set_num_threads(1)  # a fork does not take a thread pool along
        harness._context = multiprocessing.get_context("fork")  # type: ignore[assignment]
        module, name = function.split(":")
        sender.send((True, getattr(importlib.import_module(module), name)(*arguments)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
