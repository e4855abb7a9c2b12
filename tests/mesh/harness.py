"""Run a function on a mesh of gloo ranks: `run_mesh(function, argument, tensor=2, context=2, ...)`.

Ranks come from a fork server that has imported torch and Megatron-Core once, so a mesh starts in a fraction of a
second; spawned processes would import both again, every rank for itself.
"""

import faulthandler
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

from minpro_megatron.config.parallel import ParallelConfig

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.mesh.preload"])


def run_mesh(
    function: Callable[..., Any],
    *arguments: Any,
    deadline_s: float = 60.0,
    hang_timeout_s: float = 0.0,
    **degrees: Any,
) -> list[Any]:
    """`function(mesh, *arguments)` of every rank, in rank order. `hang_timeout_s` goes to `open_mesh`.

    Raises AssertionError with the first failing rank's traceback, or with the ranks that did not finish in time.
    """
    config = ParallelConfig(**degrees)
    results = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _context.Process(
                target=_rank, args=(function, rank, config, folder, arguments, results, deadline_s, hang_timeout_s)
            )
            for rank in range(config.world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(results, len(ranks), deadline_s)
        finally:
            for process in ranks:
                process.join(5)
                if process.is_alive():
                    process.kill()


def _collect(results: Any, world_size: int, deadline_s: float) -> list[Any]:
    returned: dict[int, Any] = {}
    end = time.monotonic() + deadline_s
    while len(returned) < world_size:
        try:
            rank, succeeded, value = results.get(timeout=max(0.1, end - time.monotonic()))
        except queue.Empty:
            missing = sorted(set(range(world_size)) - set(returned))
            raise AssertionError(f"ranks {missing} did not finish in {deadline_s} s: a collective hangs") from None
        if not succeeded:
            raise AssertionError(f"rank {rank} of {world_size} failed:\n{value}")
        returned[rank] = value
    return [returned[rank] for rank in range(world_size)]


def _rank(
    function: Callable,
    rank: int,
    config: ParallelConfig,
    folder: str,
    arguments: tuple,
    results: Any,
    deadline_s: float,
    hang_timeout_s: float,
) -> None:
    faulthandler.dump_traceback_later(deadline_s, exit=True)
    import torch

    from minpro_megatron.parallel.mesh import open_mesh

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        rendezvous = f"file://{folder}/rendezvous"
        place = {"init_method": rendezvous, "rank": rank, "world_size": config.world_size}
        with open_mesh(config, "cpu", seed=1, hang_timeout_s=hang_timeout_s, **place) as mesh:
            value = function(mesh, *arguments)
            torch.distributed.barrier()
        results.put((rank, True, value))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise SystemExit(1) from None
