"""The role `collect` in a separate process, with measurements of its event loop, CPU time per thread, and memory."""

import asyncio
import json
import logging
import re
import sys
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from minpro_megatron.config.run import RunConfig
from minpro_megatron.roles import collect
from minpro_megatron.run_folder.start_fence import StartFence

HEARTBEAT_S = 0.005


async def heartbeat(stalls: list[tuple[float, float]]) -> None:
    """Records (time, seconds late) of every turn of the event loop that is late."""
    while True:
        start = time.monotonic()
        await asyncio.sleep(HEARTBEAT_S)
        stalls.append((start, time.monotonic() - start - HEARTBEAT_S))


def thread_times() -> dict[str, float]:
    """CPU seconds of this process's threads so far, by name without number, of the process, and of the processes that
    it has started, by module."""
    times: dict[str, float] = defaultdict(float, {"process": time.process_time()})
    for thread in threading.enumerate():
        if thread.ident is not None:
            name = re.sub(r"[-_\d]+$", "", thread.name)
            times[name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            used = child.cpu_times()
            times[child.cmdline()[2].rpartition(".")[2]] += used.user + used.system
    return times


def run_collector(config: RunConfig, result: Path) -> None:
    """The role `collect`, with a heartbeat in its event loop."""
    logging.basicConfig(level=logging.WARNING)
    sys.setswitchinterval(collect.SWITCH_INTERVAL_S)
    stalls: list[tuple[float, float]] = []
    samples: list[tuple[float, dict[str, float]]] = []

    async def sample_threads() -> None:
        while True:
            samples.append((time.monotonic(), thread_times()))
            await asyncio.sleep(0.2)

    async def main() -> None:
        watching = [asyncio.create_task(heartbeat(stalls)), asyncio.create_task(sample_threads())]
        try:
            await collect._until_terminated(config, 0, StartFence(config.run_dir, 0))
        finally:
            for task in watching:
                task.cancel()

    asyncio.run(main())
    result.write_text(json.dumps({"stalls": stalls, "threads": samples}))


def run_bare_loop(result: Path, ended: Any) -> None:
    """An event loop with nothing but the heartbeat: how late this machine wakes an almost idle process, and the CPU
    time that the heartbeat itself needs."""
    stalls: list[tuple[float, float]] = []
    samples: list[tuple[float, dict[str, float]]] = []

    async def main() -> None:
        beating = asyncio.create_task(heartbeat(stalls))
        while not ended.is_set():
            samples.append((time.monotonic(), thread_times()))
            await asyncio.sleep(0.2)
        beating.cancel()

    asyncio.run(main())
    result.write_text(json.dumps({"stalls": stalls, "threads": samples}))


def peak_bytes(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def watch_peak(process: Any, peaks: list[int]) -> None:
    while process.is_alive():
        try:
            peaks.append(peak_bytes(process.pid))
        except (OSError, AssertionError):  # it has just ended
            return
        time.sleep(0.1)
