"""A discrete-event simulation of the trainer and the servers of a run, for their waiting times.

The trainer follows the order of a run (`StepOrder`); the collector's schedules (buffer/schedule.py) decide which groups
start and are consumed, and when weights may be published. A server generates one token per iteration for each running
response; the duration of an iteration depends on their number and lengths. Evaluations are sampled as in a run
(evaluation/in_run.py): after the training groups, and a version is not replaced before its evaluation has ended.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from minpro_megatron.buffer.schedule import make_schedule
from minpro_megatron.buffer.step_order import Fetch, Publish, Save, StepOrder, Train, steps_ahead
from minpro_megatron.config.run import RunConfig

MAX_STRETCH = 512  # tokens per response after which the duration of an iteration is computed again


class ServerModel(Protocol):
    """The speed of one server."""

    @property
    def num_servers(self) -> int: ...

    @property
    def max_running(self) -> int:
        """Maximum number of concurrent responses."""
        ...

    @property
    def kv_tokens(self) -> int:
        """Tokens that fit into the KV cache."""
        ...

    def iteration_s(self, running: int, context_tokens: float) -> float:
        """Seconds for one token of each of `running` responses with `context_tokens` tokens so far in total, including
        prompts."""
        ...

    def prefill_s(self, tokens: float) -> float: ...


@dataclass(frozen=True)
class Phases:
    """Seconds of a global step on the trainer."""

    score: float
    train: float
    publish: float
    pause: float  # of the servers, at the beginning of a publication
    checkpoint: float = 0.0  # of a step that saves
    checkpoint_every: int = 0  # steps; 0: never


@dataclass(frozen=True)
class Lengths:
    """Tokens of a group: of its prompt, and of each of its responses."""

    prompt: int
    responses: Sequence[int]


@dataclass(frozen=True)
class Span:
    """The trainer spent start .. end (s) in a phase: wait, score, train, publish or checkpoint."""

    phase: str
    step: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    spans: list[Span]
    step_ends: list[float]
    busy: list[list[tuple[float, float]]]  # of each server: times during which it had groups
    slots: int  # of all servers: responses that they could process at once
    slot_s: list[float]  # at each end of a step: the sum over responses so far of their time on a server
    batch_s: list[float]  # from the first issue of a step's groups to the end of the last one
    request_s: list[float]  # of each group: from its request to its answer
    evaluations: dict[int, tuple[float, float]]  # by policy version: from its publication to the last sample

    def window(self, first: int, last: int) -> tuple[float, float]:
        """Start and end of the steps first .. last - 1."""
        return (self.step_ends[first - 1] if first else 0.0), self.step_ends[last - 1]

    def wait_share(self, first: int, last: int) -> float:
        """Share of the trainer's time over these steps in which it waited."""
        start, end = self.window(first, last)
        return self.phase_s("wait", first, last) / (end - start)

    def phase_s(self, phase: str, first: int, last: int) -> float:
        """Seconds of these steps that the trainer spent in a phase."""
        window = self.window(first, last)
        return sum(_overlap(span.start, span.end, *window) for span in self.spans if span.phase == phase)

    def idle_share(self, first: int, last: int) -> float:
        """Share of the servers' time over these steps without a group."""
        start, end = self.window(first, last)
        worked = sum(_overlap(*interval, start, end) for server in self.busy for interval in server)
        return 1 - worked / ((end - start) * len(self.busy))

    def slot_share(self, first: int, last: int) -> float:
        """Share of the servers' slots that a response used, on average over these steps. Servers that finish the last
        long responses of a batch have work, but most of their slots are free."""
        start, end = self.window(first, last)
        used = self.slot_s[last - 1] - (self.slot_s[first - 1] if first else 0.0)
        return used / ((end - start) * self.slots)

    def step_s(self, first: int, last: int) -> float:
        start, end = self.window(first, last)
        return (end - start) / (last - first)


def _overlap(start: float, end: float, low: float, high: float) -> float:
    return max(0.0, min(end, high) - max(start, low))


@dataclass
class _Server:
    model: ServerModel
    index: int
    now: float = 0.0
    stalled_until: float = 0.0  # by prefills and publications
    tokens: float = 0.0  # of a response that has run from the beginning
    running: list[tuple[float, int, int]] = field(default_factory=list)  # (tokens at its end, number, group)
    waiting: deque[tuple[int, int, int, bool]] = field(default_factory=deque)  # (group, tokens, prompt's, first of it)
    context: float = 0.0
    num_groups: int = 0
    num_requests: int = 0  # of these groups: one per response
    busy_since: float = 0.0
    busy: list[tuple[float, float]] = field(default_factory=list)
    stamp: int = 0  # of its event that counts
    iteration_s: float = 1.0  # since that event was planned
    slot_s: float = 0.0  # until `now`

    def slot_s_at(self, time: float) -> float:
        """The sum over responses of their time here until `time`, before which no response ends."""
        return self.slot_s + len(self.running) * max(0.0, time - self.now)

    def advance(self, time: float) -> None:
        """Advances to `time`, before which no response ends."""
        self.slot_s = self.slot_s_at(time)
        worked = time - max(self.now, self.stalled_until)
        if worked > 0 and self.running:
            gained = worked / self.iteration_s
            self.tokens += gained
            self.context += gained * len(self.running)
        self.now = max(self.now, time)

    def next_event(self) -> float | None:
        """The time at which the next response ends or the duration of an iteration has to be computed again."""
        if not self.running:
            return None
        self.iteration_s = self.model.iteration_s(len(self.running), self.context)
        left = min(self.running[0][0] - self.tokens, MAX_STRETCH)
        return max(self.now, self.stalled_until) + max(left, 0.0) * self.iteration_s

    def admit(self, numbers: "itertools.count[int]") -> None:
        """Starts waiting responses while there are slots and the KV cache has room. Those that run may outgrow it a
        little before the next one ends; a server would then interrupt some of them."""
        while self.waiting and len(self.running) < self.model.max_running:
            if self.running and self.context + self.waiting[0][2] > self.model.kv_tokens:
                return
            group, length, prompt, first = self.waiting.popleft()
            if first:  # a group's other responses find the prompt in the prefix cache
                self.stalled_until = max(self.now, self.stalled_until) + self.model.prefill_s(prompt)
            self.context += prompt  # which every response reads separately
            heapq.heappush(self.running, (self.tokens + length, next(numbers), group))

    def ended(self) -> list[int]:
        """The groups of the responses that end at the current time."""
        found = []
        while self.running and self.running[0][0] <= self.tokens + 1e-6:
            found.append(heapq.heappop(self.running)[2])
        if found:
            self.context *= len(self.running) / (len(self.running) + len(found))
        return found

    def take(self, group: int, lengths: Lengths) -> None:
        if not self.num_groups:
            self.busy_since = self.now
        self.num_groups += 1
        self.num_requests += len(lengths.responses)
        for place, length in enumerate(lengths.responses):
            self.waiting.append((group, length, lengths.prompt, place == 0))

    def release(self, num_requests: int) -> None:
        self.num_groups -= 1
        self.num_requests -= num_requests
        if not self.num_groups:
            self.busy.append((self.busy_since, self.now))

    def pause(self, until: float, compute_again: bool) -> None:
        """Pauses for a publication; `compute_again`: the KV cache of running responses is computed again."""
        again = self.model.prefill_s(self.context) if compute_again and self.running else 0.0
        self.stalled_until = max(self.stalled_until, until) + again


# A request of the trainer to the simulation: to wait for a condition, or to spend seconds.
_Request = tuple[str, int, float | Callable[[], bool]]


class Simulation:
    """The simulation of one run; call `run` only once."""

    def __init__(
        self,
        config: RunConfig,
        phases: Phases,
        server: ServerModel,
        lengths: Callable[[int], Lengths],
        evaluations: Mapping[int, Sequence[Lengths]] | None = None,
    ) -> None:
        """`lengths` of a training group, by its number; `evaluations`: the groups that are sampled in addition to the
        training groups with some policy versions."""
        self._config, self._phases, self._lengths = config, phases, lengths
        self._servers = [_Server(server, index) for index in range(server.num_servers)]
        self._loads = [(0, index) for index in range(server.num_servers)]
        self._max_requests = config.server.max_requests_under_way
        self._queue: deque[int] = deque()
        self._evaluations = dict(evaluations or {})
        self._evaluation_queue: deque[int] = deque()
        self._evaluation_lengths: dict[
            int, Lengths
        ] = {}  # by negative numbers; numbers of training groups are positive
        self._evaluation_left = 0  # groups that have not ended
        self._evaluated: dict[int, tuple[float, float]] = {}
        self._sent: dict[int, float] = {}
        self._request_s: list[float] = []
        self._left: dict[int, int] = {}  # responses of a group that have not ended
        self._server_of: dict[int, _Server] = {}
        self._issued: dict[int, float] = {}
        self._ended: dict[int, float] = {}
        self._events: list[tuple[float, int, _Server]] = []
        self._numbers = itertools.count()
        self._spans: list[Span] = []
        self._step_ends: list[float] = []
        self._slot_s: list[float] = []
        self._batch_s: list[float] = []
        self._now = 0.0

    def run(self, num_steps: int) -> Timeline:
        """Simulates the first `num_steps` global steps of a longer run."""
        beyond = max(self._config.staleness.delay_steps, self._config.staleness.max_staleness) + 2
        config = self._config.model_copy(update={"num_global_steps": num_steps + beyond})
        self._schedule = make_schedule(config)
        trainer = self._trainer(num_steps)
        request, since = next(trainer), 0.0
        while True:
            self._issue()
            phase, step, what = request
            done = what() if callable(what) else self._now >= since + what
            if done:
                self._spans.append(Span(phase, step, since, self._now))
                since = self._now
                try:
                    request = next(trainer)
                except StopIteration:
                    return self._timeline()
                continue
            self._step_to(None if callable(what) else since + what)

    def _trainer(self, num_steps: int) -> Generator[_Request]:
        """The requests of the trainer in the first `num_steps` steps of a longer run."""
        ahead = steps_ahead(self._config.staleness)
        order = StepOrder(num_steps + ahead, ahead)
        for fetch in order.before_first_step():
            yield from self._fetch_and_score(fetch.batch, 0)
        for step in range(num_steps):
            for event in order.of_step(step):
                match event:
                    case Fetch():
                        yield from self._fetch_and_score(event.batch, step)
                    case Train():
                        yield ("train", step, self._phases.train)
                        self._schedule.consumed(step)
                    case Publish():
                        yield from self._publish(step)
                    case Save(version):
                        self._step_ends.append(self._now)
                        self._slot_s.append(sum(server.slot_s_at(self._now) for server in self._servers))
                        if self._phases.checkpoint_every and version % self._phases.checkpoint_every == 0:
                            yield ("checkpoint", step, self._phases.checkpoint)

    def _publish(self, step: int) -> Generator[_Request]:
        yield ("wait", step, lambda: self._schedule.may_publish() and not self._evaluation_left)
        self._pause(self._phases.pause)
        yield ("publish", step, self._phases.publish)
        self._schedule.published()

    def _fetch_and_score(self, index: int, step: int) -> Generator[_Request]:
        yield ("wait", step, lambda: self._schedule.batch(index) is not None)
        chosen = self._schedule.batch(index)
        assert chosen is not None
        groups = chosen.group_ids
        started, ended = min(map(self._issued.__getitem__, groups)), max(map(self._ended.__getitem__, groups))
        self._batch_s.append(ended - started)
        yield ("score", step, self._phases.score)

    def _pause(self, seconds: float) -> None:
        again = self._config.publish.pause_mode == "retract"
        for server in self._servers:
            server.advance(self._now)
            server.pause(self._now + seconds, again)
            self._plan_event(server)

    def _issue(self) -> None:
        for slot in self._schedule.to_issue():
            self._issued[slot.group_id] = self._now
            self._queue.append(slot.group_id)
        self._start_evaluation(self._schedule.version)
        while queue := self._queue or self._evaluation_queue:
            group = queue[0]
            lengths = self._lengths_of(group)
            server = self._least_loaded()
            if server.num_requests and server.num_requests + len(lengths.responses) > self._max_requests:
                return
            queue.popleft()
            self._left[group], self._server_of[group] = len(lengths.responses), server
            self._sent[group] = self._now
            server.advance(self._now)
            server.take(group, lengths)
            heapq.heappush(self._loads, (server.num_requests, server.index))
            server.admit(self._numbers)
            self._plan_event(server)

    def _least_loaded(self) -> _Server:
        """The first of the servers with the fewest requests. The heap also has entries of earlier loads."""
        while self._loads[0][0] != self._servers[self._loads[0][1]].num_requests:
            heapq.heappop(self._loads)
        return self._servers[self._loads[0][1]]

    def _start_evaluation(self, version: int) -> None:
        for lengths in self._evaluations.pop(version, ()):
            group = -1 - len(self._evaluation_lengths)
            self._evaluation_lengths[group] = lengths
            self._evaluation_queue.append(group)
            self._evaluation_left += 1
            self._evaluated[version] = (self._now, self._now)

    def _lengths_of(self, group: int) -> Lengths:
        return self._evaluation_lengths[group] if group < 0 else self._lengths(group)

    def _end_group(self, group: int, server: _Server) -> None:
        server.release(len(self._lengths_of(group).responses))
        heapq.heappush(self._loads, (server.num_requests, server.index))
        self._request_s.append(self._now - self._sent.pop(group))
        if group >= 0:
            self._ended[group] = self._now
            self._schedule.collected(group, accepted=True)
            return
        self._evaluation_left -= 1
        version = self._schedule.version  # a version is not replaced before its evaluation has ended
        self._evaluated[version] = (self._evaluated[version][0], self._now)

    def _plan_event(self, server: _Server) -> None:
        server.stamp = next(self._numbers)
        time = server.next_event()
        if time is not None:
            heapq.heappush(self._events, (time, server.stamp, server))

    def _step_to(self, limit: float | None) -> None:
        """Advances to the next end of a group, or to `limit` if that is earlier."""
        group_ended = False
        while not group_ended:
            while self._events and self._events[0][1] != self._events[0][2].stamp:
                heapq.heappop(self._events)
            if not self._events or (limit is not None and limit <= self._events[0][0]):
                assert limit is not None, "the trainer waits and no group is in progress"
                self._now = max(self._now, limit)
                return
            self._now, _, server = heapq.heappop(self._events)
            server.advance(self._now)
            for group in server.ended():
                self._left[group] -= 1
                if not self._left[group]:
                    group_ended = True
                    self._end_group(group, server)
            server.admit(self._numbers)
            self._plan_event(server)

    def _timeline(self) -> Timeline:
        for server in self._servers:
            if server.num_groups:
                server.busy.append((server.busy_since, self._now))
        busy = [server.busy for server in self._servers]
        return Timeline(
            spans=self._spans,
            step_ends=self._step_ends,
            busy=busy,
            slots=sum(server.model.max_running for server in self._servers),
            slot_s=self._slot_s,
            batch_s=self._batch_s,
            request_s=self._request_s,
            evaluations=self._evaluated,
        )
