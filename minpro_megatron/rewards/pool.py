"""Grading in worker processes with hard limits of time and memory: model output is untrusted, and graders may hang.

A grade fails if the grader raises, does not return a finite number, dies, or exceeds its time. It is then retried once,
alone in a new process. If that fails as well, the response has no reward. The failure is not replaced by a reward: with
rewards of -1 and +1 a 0 would be worth more than a wrong answer, and a policy would learn to hang the grader.

The time limit is one of processor time, so grades do not fail on a busy machine. Wall time has a limit WALL_FACTOR
times as long, for a grader that waits.
"""

import asyncio
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import msgspec

from minpro_megatron.errors import ProjectError, UserError
from minpro_megatron.pipe_messages import framed, next_message
from minpro_megatron.rewards.failures import FailureCounts
from minpro_megatron.rewards.forms import Form, GroupToGrade
from minpro_megatron.rewards.judging import GradingFailed, Judged, Judgement
from minpro_megatron.rewards.worker import OUT_OF_MEMORY, Request

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
_TIME_SIGNALS = (-signal.SIGPROF, -signal.SIGALRM)


class RewardWorkerError(ProjectError):
    """A grading process does not start at all: a fault of the installation, not of a response."""


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
        self.forms: dict[str, Form] = {}  # of the rewards by name, once the process has started

    async def start(self) -> None:
        if self._process is not None:
            return
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        try:
            ready = await asyncio.wait_for(self._read(), START_TIMEOUT_S)
        except (TimeoutError, asyncio.IncompleteReadError):
            await self.kill()
            raise RewardWorkerError(
                f"the grading process did not start: {' '.join(self._command)}; see its error above"
            ) from None
        except asyncio.CancelledError:
            await self.kill()  # its first output would be taken for an answer
            raise
        forms = msgspec.msgpack.decode(ready, type=dict[str, Form] | str)
        if isinstance(forms, str):
            await self.kill()
            raise UserError(forms)
        self.forms = forms

    async def grade_some(self, reward: str, texts: Sequence[str], answer: str) -> list[Judgement | _Failure]:
        """The results of `texts` up to the first one that hangs or kills the grader, which is the last result. The
        limits apply to each response."""
        await self.start()
        results: list[Judgement | _Failure] = []
        try:
            # All at once: a round trip between two processes per response would cost more than most
            # graders.
            for text in texts:
                self._write(Request(reward, text, answer))
            while len(results) < len(texts):
                found = msgspec.msgpack.decode(await self._read_within(self._wall_s), type=Judgement | str)
                results.append(found if isinstance(found, Judgement) else _Failure(f"grader failed: {found}", False))
        except TimeoutError:
            await self.kill()
            results.append(_late(self._wall_s))
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            results.append(self._explained(await self.kill()))
        except asyncio.CancelledError:
            await self.kill()  # its answers would be taken for those of the next responses
            raise
        return results

    async def grade_group(self, reward: str, group: GroupToGrade) -> list[Judgement] | _Failure:
        """The results of the responses of a group. The limits are multiplied by the number of responses."""
        await self.start()
        wall_s = self._wall_s * max(1, len(group.responses))
        try:
            self._write(Request(reward, group=group))
            found = msgspec.msgpack.decode(await self._read_within(wall_s), type=list[Judgement] | str)
        except TimeoutError:
            await self.kill()
            return _late(wall_s)
        except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
            return self._explained(await self.kill())
        except asyncio.CancelledError:
            await self.kill()  # its answer would be taken for that of the next group
            raise
        return found if isinstance(found, list) else _Failure(f"grader failed: {found}", False)

    def _write(self, request: Request) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(framed(msgspec.msgpack.encode(request)))

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
        return await next_message(self._process.stdout)

    async def kill(self) -> int:
        """Ends the process, if there is one. Returns its exit status, which is its own if it had already ended."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with suppress(ProcessLookupError):
            process.kill()
        return await process.wait()


def _late(wall_s: float) -> _Failure:
    return _Failure(f"grader took more than {wall_s:g} s of wall time", True)


class RewardPool:
    """`num_workers` grading processes for functions that are not async; use inside `async with`."""

    def __init__(
        self,
        rewards: Sequence[str],
        num_workers: int,
        timeout_s: float,
        command: Sequence[str] | None = None,
        wall_factor: float = WALL_FACTOR,
        counts: FailureCounts | None = None,
    ) -> None:
        """For the `rewards`, by their names. `timeout_s` is the processor time for one response; `counts` counts the
        failures.

        `command` replaces the worker's command line and `wall_factor` WALL_FACTOR, in tests. A reward that cannot be
        imported raises UserError on entering.
        """
        wall_s = wall_factor * timeout_s
        # The pool ends a worker that exceeds its wall time; a worker ends itself only if its collector has been killed.
        command = command or worker_command(rewards, timeout_s, ORPHAN_FACTOR * wall_s)
        self._workers = [_Worker(command, timeout_s, wall_s) for _ in range(num_workers)]
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._failures_in_a_row = 0
        self._counts = counts or FailureCounts()

    async def __aenter__(self) -> "RewardPool":
        # The first worker is started now: a failing start should be known before anything is sampled.
        await self._workers[0].start()
        for worker in self._workers:
            self._idle.put_nowait(worker)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(worker.kill() for worker in self._workers))

    def form(self, reward: str) -> Form:
        """The form of a reward's function, which the first worker has reported."""
        return self._workers[0].forms.get(reward, "response")

    @property
    def num_failed(self) -> int:
        """Responses without a reward because their grader raised, returned no finite number or died."""
        return self._counts.num_failed

    @property
    def num_timed_out(self) -> int:
        """Responses without a reward because their grader exceeded its time."""
        return self._counts.num_timed_out

    def metrics(self) -> dict[str, float]:
        """Counts since the start, under the names that metrics.metric declares."""
        return self._counts.metrics()

    async def judge_all(
        self, reward: str, texts: Sequence[str], answer: str, stop_at_failure: bool = False
    ) -> list[Judged]:
        """The responses to one prompt, judged by `reward`, in order. With `stop_at_failure` the list ends at the first
        response that cannot be graded."""
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

    async def judge_group(self, reward: str, group: GroupToGrade) -> list[Judgement]:
        """The judgements of a group's responses by the group form of a reward. Raises GradingFailed if that fails, also
        when it is repeated in a new process."""
        worker = await self._idle.get()
        try:
            result = await worker.grade_group(reward, group)
            if isinstance(result, _Failure) and self._failures_in_a_row < MAX_RETRIES_IN_A_ROW:
                await worker.kill()
                result = await worker.grade_group(reward, group)
        finally:
            self._idle.put_nowait(worker)
        if isinstance(result, _Failure):
            self._failures_in_a_row += 1
            raise GradingFailed(result.problem, result.timed_out)
        self._failures_in_a_row = 0
        return result

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
        self._counts.count(result.problem, result.timed_out, text, answer)
        return Judged(None, problem=result.problem)
