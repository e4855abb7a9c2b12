"""Grading in worker processes with hard limits of time and memory: model output is untrusted, and graders may hang.

A grade fails if the grader raises, does not return a finite number, dies, or exceeds its time. It is then retried once,
alone in a new process. If that fails as well, the response has no reward. The failure is not replaced by a reward: with
rewards of -1 and +1 a 0 would be worth more than a wrong answer, and a policy would learn to hang the grader.

The time limit is one of processor time, so grades do not fail on a busy machine. Wall time has a limit WALL_FACTOR
times as long, for a grader that waits.
"""

import asyncio
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from minpro_megatron.errors import ProjectError, UserError
from minpro_megatron.rewards.registry import check_reward_name
from minpro_megatron.rewards.worker import LENGTH, OUT_OF_MEMORY, Judgement

log = logging.getLogger(__name__)

WORKER_MODULE = "minpro_megatron.rewards.worker"
START_TIMEOUT_S = 120.0
# The wall time limit of a grade, as a multiple of its processor time limit.
WALL_FACTOR = 10.0
# A worker ends itself after this multiple of the wall time limit if its parent no longer exists.
ORPHAN_FACTOR = 3.0
# For an answer that arrived in time while the event loop was busy, so that it has not been read yet.
GRACE_S = 0.05
# A symbolic checker can be made to expand an expression without end; this limit ends its process before memory
# runs out. With its libraries a worker needs 0.2 GiB.
MEMORY_LIMIT_BYTES = 4 * 2**30
# After this number of consecutive responses that could not be graded the grader is considered broken: a new process for
# each would only cost time. One successful grade resets the count.
MAX_RETRIES_IN_A_ROW = 8
# The number of failures that are logged individually; later ones are only counted.
MAX_LOGGED_FAILURES = 5
_TIME_SIGNALS = (-signal.SIGPROF, -signal.SIGALRM)


class RewardWorkerError(ProjectError):
    """A grading process does not start at all: a fault of the installation, not of a response."""


@dataclass(frozen=True)
class Judged:
    """A response's reward, the part that was compared and the grader's time; or, without a reward, the problem."""

    reward: float | None
    extracted: str | None = None
    seconds: float | None = None
    problem: str | None = None


class _Failure(NamedTuple):
    problem: str
    timed_out: bool


def worker_command(names: Sequence[str], timeout_s: float, wall_s: float) -> list[str]:
    """The command line of a process that grades with the rewards `names`. A response that needs more than `timeout_s`
    of processor time or `wall_s` of wall time ends the process."""
    limits = [MEMORY_LIMIT_BYTES, timeout_s, wall_s]
    return [sys.executable, "-m", WORKER_MODULE, *map(str, limits), *names]


class _Worker:
    """One grading process; started when it is first needed, and restarted after it was killed."""

    def __init__(self, command: Sequence[str], timeout_s: float, wall_s: float) -> None:
        self._command = command
        self._timeout_s = timeout_s
        self._wall_s = wall_s
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        if self._process is not None:
            return
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            refusal = await asyncio.wait_for(self._read(), START_TIMEOUT_S)
        except (TimeoutError, asyncio.IncompleteReadError):
            await self.kill()
            raise RewardWorkerError(
                f"the grading process did not start: {' '.join(self._command)}; see its error above"
            ) from None
        except asyncio.CancelledError:
            await self.kill()  # its first output would be taken for an answer
            raise
        if refusal:
            await self.kill()
            raise UserError(refusal.decode())

    async def grade_some(self, reward: str, texts: Sequence[str], answer: str) -> list[Judgement | _Failure]:
        """The results of `texts` up to the first one that hangs or kills the grader, which is the last result. The
        limits apply to each response."""
        await self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        results: list[Judgement | _Failure] = []
        try:
            # All at once: a round trip between two processes per response would cost more than most
            # graders.
            for text in texts:
                request = msgspec.msgpack.encode((reward, text, answer))
                self._process.stdin.write(LENGTH.pack(len(request)) + request)
            while len(results) < len(texts):
                found = msgspec.msgpack.decode(await self._read_within(self._wall_s), type=Judgement | str)
                results.append(found if isinstance(found, Judgement) else _Failure(f"grader failed: {found}", False))
        except TimeoutError:
            await self.kill()
            results.append(_Failure(f"grader took more than {self._wall_s:g} s of wall time", True))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            results.append(self._explained(await self.kill()))
        except asyncio.CancelledError:
            await self.kill()  # its answers would be taken for those of the next responses
            raise
        return results

    def _explained(self, exit_status: int) -> _Failure:
        if exit_status in _TIME_SIGNALS:
            limit = f"reward.timeout_s = {self._timeout_s:g} s of processor time"
            return _Failure(f"grader exceeded {limit}", True)
        if exit_status == OUT_OF_MEMORY:
            return _Failure(f"grader needed more than {MEMORY_LIMIT_BYTES / 2**30:g} GiB of memory", False)
        return _Failure(f"grader died with exit status {exit_status}", False)

    async def _read_within(self, timeout_s: float) -> bytes:
        """Raises TimeoutError if the grader is late, but not if only this process is late and the answer is there."""
        reading = asyncio.create_task(self._read())
        try:
            done, _ = await asyncio.wait({reading}, timeout=timeout_s)
            if not done:
                done, _ = await asyncio.wait({reading}, timeout=GRACE_S)
            if not done:
                raise TimeoutError
            return reading.result()
        finally:
            reading.cancel()

    async def _read(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
        return await self._process.stdout.readexactly(length)

    async def kill(self) -> int:
        """Ends the process, if there is one. Returns its exit status, which is its own if it had already ended."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with suppress(ProcessLookupError):
            process.kill()
        return await process.wait()


class RewardPool:
    """`num_workers` grading processes; use inside `async with`.

    `num_failed` counts responses without a reward because their grader raised, returned no finite number or died;
    `num_timed_out` counts those whose grader exceeded its time.
    """

    def __init__(
        self,
        reward: str,
        num_workers: int,
        timeout_s: float,
        by_source: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
        wall_factor: float = WALL_FACTOR,
    ) -> None:
        """`reward` grades the prompts of all sources that are not in `by_source`. `timeout_s` is the processor time
        for one response.

        `command` replaces the worker's command line and `wall_factor` WALL_FACTOR, in tests. Raises UserError for an
        unknown reward. One that cannot be imported raises it on entering.
        """
        self._default, self._by_source = reward, dict(by_source or {})
        check_reward_name(reward)
        for source, name in self._by_source.items():
            check_reward_name(name, f"reward.by_source[{source!r}]")
        wall_s = wall_factor * timeout_s
        # The pool ends a worker that exceeds its wall time; a worker ends itself only if its collector has been killed.
        command = command or worker_command(
            sorted({reward, *self._by_source.values()}), timeout_s, ORPHAN_FACTOR * wall_s
        )
        self._workers = [_Worker(command, timeout_s, wall_s) for _ in range(num_workers)]
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._failures_in_a_row = 0
        self.num_failed = 0
        self.num_timed_out = 0

    async def __aenter__(self) -> "RewardPool":
        # The first worker is started now: a failing start should be known before anything is sampled.
        await self._workers[0].start()
        for worker in self._workers:
            self._idle.put_nowait(worker)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(worker.kill() for worker in self._workers))

    def metrics(self) -> dict[str, float]:
        """Counts since the start, under the names that metrics.metric declares."""
        return {
            "reward/grader_failed": float(self.num_failed),
            "reward/grader_timed_out": float(self.num_timed_out),
        }

    async def judge_all(
        self, texts: Sequence[str], answer: str, source: str, stop_at_failure: bool = False
    ) -> list[Judged]:
        """The judged responses to one prompt of `source`, in order. With `stop_at_failure` the list ends at the first
        response that cannot be graded."""
        reward = self._by_source.get(source, self._default)
        worker = await self._idle.get()
        judged: list[Judged] = []
        try:
            while len(judged) < len(texts):
                for result in await worker.grade_some(reward, texts[len(judged) :], answer):
                    judged.append(await self._judged(worker, reward, texts[len(judged)], answer, result))
                    if stop_at_failure and judged[-1].reward is None:
                        return judged
        finally:
            self._idle.put_nowait(worker)
        return judged

    async def _judged(
        self, worker: _Worker, reward: str, text: str, answer: str, result: Judgement | _Failure
    ) -> Judged:
        if isinstance(result, _Failure) and self._failures_in_a_row < MAX_RETRIES_IN_A_ROW:
            await worker.kill()
            (result,) = await worker.grade_some(reward, [text], answer)
        if isinstance(result, Judgement):
            self._failures_in_a_row = 0
            return Judged(result.reward, result.extracted, result.seconds)
        self._failures_in_a_row += 1
        self._count(result, text, answer)
        return Judged(None, problem=result.problem)

    def _count(self, failure: _Failure, text: str, answer: str) -> None:
        if failure.timed_out:
            self.num_timed_out += 1
        else:
            self.num_failed += 1
        total = self.num_failed + self.num_timed_out
        if total <= MAX_LOGGED_FAILURES:
            log.warning("no reward for %r against %r: %s", text[-200:], answer[:200], failure.problem)
        elif total.bit_count() == 1:  # 8, 16, 32, ...
            log.warning(
                "no reward for %d responses since the start: grader failed for %d, exceeded its time for %d; the last "
                "one: %s", total, self.num_failed, self.num_timed_out, failure.problem,
            )  # fmt: skip
