"""Large answers are checked in other processes, because the check creates a Python object for each token.

In the collector's own process that takes more time of its interpreter than everything else together
(benchmarks/collector_load.md).
"""

import asyncio
import logging
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO, cast

import msgspec

from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.pipe_messages import read_message, write_message
from minpro_megatron.serving.answer_worker import Job, decode_result, encode_facts
from minpro_megatron.serving.answers import AnswerChecker, SampledSequence, SentRequest
from minpro_megatron.serving.errors import InvalidAnswer

log = logging.getLogger(__name__)

WORKER_MODULE = "minpro_megatron.serving.answer_worker"
# One process checks 2 to 3 million tokens per second on a core of its own, ten times a fleet of 64 GPUs needs 1.1
# million. The second one starts only if an answer arrives while the first one works.
NUM_PROCESSES = 2
# Larger answers are checked in a process: checking this number of bytes takes about half a millisecond.
LARGE_ANSWER_BYTES = 64 * 1024


class AnswerProcesses:
    """Checks the answers of all servers of a process; use inside `with`. A process starts when it is first needed."""

    def __init__(self, facts: ModelFacts, num_processes: int = NUM_PROCESSES) -> None:
        self._workers = [_Worker(facts) for _ in range(num_processes)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # the last one used is the next one used
        for worker in self._workers:
            self._idle.put(worker)
        # A thread only waits for its process, without the interpreter.
        self._threads = ThreadPoolExecutor(num_processes, "answers")

    def __enter__(self) -> "AnswerProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the processes. Checks that still run fail; nobody waits for them any more."""
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.reap()

    async def check(
        self, checker: AnswerChecker, body: bytes, requests: Sequence[SentRequest]
    ) -> list[SampledSequence]:
        """The result of `checker.check`. Raises InvalidAnswer also if the process ends twice during the check."""
        if len(body) < LARGE_ANSWER_BYTES:
            return checker.check(body, requests)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._check_in_process, checker, body, requests)

    def _check_in_process(
        self, checker: AnswerChecker, body: bytes, requests: Sequence[SentRequest]
    ) -> list[SampledSequence]:
        job = msgspec.msgpack.encode(Job(checker.server, checker.exact_versions, requests))
        worker = self._idle.get()
        try:
            for _ in range(2):
                result = worker.result(job, body)
                if result is not None:
                    return decode_result(result)
        finally:
            self._idle.put(worker)
        problem = f"the process that checks its {len(body)} bytes has ended twice; see its error in the log"
        raise InvalidAnswer(checker.server, requests[0].request_id, "body", problem)


class _Worker:
    """One process; used by one thread at a time."""

    def __init__(self, facts: ModelFacts) -> None:
        self._facts = encode_facts(facts)
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._changing = threading.Lock()

    def result(self, job: bytes, body: bytes) -> bytearray | None:
        """The result of a job, as a message; None if the process has ended. Starts one if there is none."""
        try:
            process = self._started()
            source, sink = cast(BinaryIO, process.stdout), cast(BinaryIO, process.stdin)
            write_message(sink, job)
            write_message(sink, body)
            if (result := read_message(source)) is not None:
                return result
        except BrokenPipeError:
            pass
        self.reap()
        return None

    def _started(self) -> subprocess.Popen[bytes]:
        with self._changing:
            if self._closed:
                raise BrokenPipeError
            if self._process is None:
                command = [sys.executable, "-m", WORKER_MODULE]
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                write_message(cast(BinaryIO, self._process.stdin), self._facts)
            return self._process

    def reap(self) -> None:
        """Waits for a process that has ended or been killed."""
        with self._changing:
            if self._process is not None:
                status = _reaped(self._process)
                if not self._closed:
                    log.warning("a process that checks answers ended with status %d", status)
            self._process = None

    def close(self) -> None:
        with self._changing:
            self._closed = True
            if self._process is not None:
                self._process.kill()  # a thread that waits for its result then returns


def _reaped(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a process that has ended; closes its pipes."""
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # of what is still buffered
            cast(BinaryIO, pipe).close()
    return process.wait()
