"""A server in the simulation of a run: which responses it processes, and when the next one ends.

A server generates one token per iteration for each running response; the duration of an iteration depends on their
number and lengths. The turns of an episode are requests of their own, and between them it is not on the server.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

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
class Lengths:
    """Tokens of a group: of its prompt, and of each of its responses.

    In episodes a response has several turns, of the same number of sampled tokens. The environment answers each but the
    last after `answer_s` seconds, with `answer_tokens` tokens, which belong to the response.
    """

    prompt: int
    responses: Sequence[int]
    turns: Sequence[int] = ()  # of each response; empty: no episodes
    answer_tokens: int = 0
    answer_s: float = 0.0

    def first_turns(self, group: int, sent: float) -> "list[Turn]":
        """A group's other responses find the prompt in the prefix cache."""
        turns = self.turns or [1] * len(self.responses)
        return [
            Turn(
                group,
                left=length - (count - 1) * self.answer_tokens,
                turns=count,
                context=self.prompt,
                prefill=0 if place else self.prompt,
                sent=sent,
            )
            for place, (length, count) in enumerate(zip(self.responses, turns, strict=True))
        ]

    def first(self, count: int) -> "Lengths":
        """Those of a group of only the first `count` responses."""
        return replace(self, responses=self.responses[:count], turns=self.turns[:count])


@dataclass(frozen=True)
class Turn:
    """A request for a turn of a response, from which the turns after it follow."""

    group: int
    left: int  # tokens that the policy samples in this turn and those after it
    turns: int  # this one and those after it
    context: int  # tokens before it
    prefill: int  # of these, those that are not in the prefix cache
    sent: float  # time (s) of the request

    @property
    def length(self) -> int:
        return -(-self.left // self.turns)

    def next(self, answer_tokens: int, sent: float) -> "Turn":
        """The turn after the answer, if the prefix cache still has what was before it."""
        context = self.context + self.length + answer_tokens
        return Turn(self.group, self.left - self.length, self.turns - 1, context, answer_tokens, sent)


@dataclass
class Server:
    model: ServerModel
    index: int
    now: float = 0.0
    stalled_until: float = 0.0  # by prefills and publications
    tokens: float = 0.0  # of a response that has run from the beginning
    running: list[tuple[float, int, Turn]] = field(default_factory=list)  # (tokens at its end, number, turn)
    waiting: deque[Turn] = field(default_factory=deque)
    context: float = 0.0
    num_groups: int = 0
    num_requests: int = 0  # of these groups: one per response; without episodes between their turns or over
    num_pauses: int = 0
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
            if self.running and self.context + self.waiting[0].context > self.model.kv_tokens:
                return
            turn = self.waiting.popleft()
            if turn.prefill:
                self.stalled_until = max(self.now, self.stalled_until) + self.model.prefill_s(turn.prefill)
            self.context += turn.context  # which every response reads separately
            heapq.heappush(self.running, (self.tokens + turn.length, next(numbers), turn))

    def ended(self) -> list[Turn]:
        """The turns that end at the current time."""
        found = []
        while self.running and self.running[0][0] <= self.tokens + 1e-6:
            found.append(heapq.heappop(self.running)[2])
        self.context = max(0.0, self.context - sum(turn.context + turn.length for turn in found))
        return found

    def take(self, group: int, lengths: Lengths) -> None:
        if not self.num_groups:
            self.busy_since = self.now
        self.num_groups += 1
        self.num_requests += len(lengths.responses)
        self.waiting.extend(lengths.first_turns(group, self.now))

    def release(self) -> None:
        """A group is over."""
        self.num_groups -= 1
        if not self.num_groups:
            self.busy.append((self.busy_since, self.now))

    def pause(self, until: float, compute_again: bool) -> None:
        """Pauses for a publication; `compute_again`: the KV cache of running responses is computed again."""
        again = self.model.prefill_s(self.context) if compute_again and self.running else 0.0
        self.stalled_until = max(self.stalled_until, until) + again
        self.num_pauses += 1
