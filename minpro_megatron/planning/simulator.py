"""A discrete-event simulation of the trainer and the servers of a run, for their waiting times.

The trainer follows the order of a run (`StepOrder`); the collector's schedules (buffer/schedule.py) decide which groups
start and are consumed, and when weights may be published. Servers are simulated in simulated_server.py. Evaluations are
sampled as in a run (evaluation/in_run.py): after the training groups, and a version is not replaced before its
evaluation has ended.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace

from minpro_megatron.buffer.schedule import make_schedule
from minpro_megatron.buffer.step_order import Fetch, Publish, Release, Save, StepOrder, Train, steps_ahead
from minpro_megatron.config.run import RunConfig
from minpro_megatron.planning.simulated_server import Lengths, Server, ServerModel, Turn


@dataclass(frozen=True)
class Phases:
    """Seconds of a global step on the trainer."""

    score: float
    train: float
    publish: float
    pause: float  # of the servers, at the beginning of a publication
    release: float = 0.0  # on shared GPUs: of the servers' memory, and the return of the trainer's states to the device
    checkpoint: float = 0.0  # of a step that saves
    checkpoint_every: int = 0  # steps; 0: never


@dataclass(frozen=True)
class Span:
    """The trainer spent start .. end (s) in a phase: wait, release, score, train, publish or checkpoint."""

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
    request_s: list[float]  # of each request, which is a group's or a turn's: until its answer
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
        self._servers = [Server(server, index) for index in range(server.num_servers)]
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
        self._request_s: list[float] = []
        self._left: dict[int, int] = {}  # responses of a group that have not ended
        self._server_of: dict[int, Server] = {}
        self._issued: dict[int, float] = {}
        self._ended: dict[int, float] = {}
        self._events: list[tuple[float, int, Server]] = []
        self._answers: list[tuple[float, int, int, Turn]] = []  # (time, number, pauses of its server so far, next turn)
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
        order = StepOrder(num_steps + ahead, ahead, in_turns=self._config.server.takes_turns)
        for fetch in order.before_first_step():
            yield from self._fetch_and_score(fetch.batch, 0)
        for step in range(num_steps):
            for event in order.of_step(step):
                match event:
                    case Release():
                        yield ("wait", step, self._has_done_all)
                        yield ("release", step, self._phases.release)
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
        yield ("wait", step, self._has_done_all)
        self._pause(self._phases.pause)
        yield ("publish", step, self._phases.publish)
        self._schedule.published()

    def _has_done_all(self) -> bool:
        """Whether the servers have no work of the current version left."""
        return self._schedule.may_publish() and not self._evaluation_left

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
            server.advance(self._now)
            server.take(group, lengths)
            self._change_load(server, 0)
            server.admit(self._numbers)
            self._plan_event(server)

    def _least_loaded(self) -> Server:
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

    def _end_group(self, group: int, server: Server) -> None:
        lengths = self._lengths_of(group)
        server.release()
        if not lengths.turns:
            self._change_load(server, -len(lengths.responses))
        if group >= 0:
            self._ended[group] = self._now
            self._schedule.collected(group, accepted=True)
            return
        self._evaluation_left -= 1
        version = self._schedule.version  # a version is not replaced before its evaluation has ended
        self._evaluated[version] = (self._evaluated[version][0], self._now)

    def _plan_event(self, server: Server) -> None:
        server.stamp = next(self._numbers)
        time = server.next_event()
        if time is not None:
            heapq.heappush(self._events, (time, server.stamp, server))

    def _step_to(self, limit: float | None) -> None:
        """Advances to the next time at which a server has room for another group, or to `limit` if that is earlier."""
        room = False
        while not room:
            while self._events and self._events[0][1] != self._events[0][2].stamp:
                heapq.heappop(self._events)
            answered = self._answers[0][0] if self._answers else math.inf
            next_event = self._events[0][0] if self._events else math.inf
            if limit is not None and limit <= min(answered, next_event):
                self._now = max(self._now, limit)
                return
            assert self._events or self._answers, "the trainer waits and no group is in progress"
            if answered <= next_event:
                self._resume()
                continue
            self._now, _, server = heapq.heappop(self._events)
            server.advance(self._now)
            for turn in server.ended():
                room = self._end_turn(turn, server) or room
            server.admit(self._numbers)
            self._plan_event(server)

    def _end_turn(self, turn: Turn, server: Server) -> bool:
        """Whether the server has room for another group now. An episode that is over or waits for an answer keeps no
        place (fleet/held_server.py); a response without turns does until its group is over."""
        lengths = self._lengths_of(turn.group)
        if lengths.turns or self._left[turn.group] == 1:  # the end of a request
            self._request_s.append(self._now - turn.sent)
        if lengths.turns:
            self._change_load(server, -1)
        if turn.turns > 1:
            time = self._now + lengths.answer_s
            following = turn.next(lengths.answer_tokens, time)
            heapq.heappush(self._answers, (time, next(self._numbers), server.num_pauses, following))
            return True
        self._left[turn.group] -= 1
        if not self._left[turn.group]:
            self._end_group(turn.group, server)
        return bool(lengths.turns) or not self._left[turn.group]

    def _resume(self) -> None:
        """The first answer reaches its episode, whose cached tokens are those of older weights after a publication."""
        self._now, _, pauses, turn = heapq.heappop(self._answers)
        server = self._server_of[turn.group]
        server.advance(self._now)
        server.waiting.append(turn if pauses == server.num_pauses else replace(turn, prefill=turn.context))
        self._change_load(server, 1)
        server.admit(self._numbers)
        self._plan_event(server)

    def _change_load(self, server: Server, requests: int) -> None:
        server.num_requests += requests
        heapq.heappush(self._loads, (server.num_requests, server.index))

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
