"""One rollout server as the collector sees it: whether it answers, which version it holds, how much is in flight."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import numpy as np

from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.fleet.generation_watch import GenerationWatch
from minpro_megatron.fleet.idle_time import IdleTime
from minpro_megatron.fleet.response_rate import ResponseRate
from minpro_megatron.fleet.suspension import Suspension
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.api_key import authorization
from minpro_megatron.serving.client import Check, SamplingParameters, ServerClient, check_here

Key = tuple[int, int]  # (index, start) of a server


class Client(Protocol):
    """The methods of a server's client; implemented by `minpro_megatron.serving.client.ServerClient`."""

    name: str

    async def __aenter__(self) -> "Client": ...

    async def __aexit__(self, *_: object) -> None: ...

    async def policy_version(self, timeout_s: float) -> int: ...

    async def generates(self, timeout_s: float) -> bool: ...

    async def generate(
        self,
        prompt_token_ids: np.ndarray,
        seeds: Sequence[int],
        sampling: SamplingParameters,
        policy_version: int,
        before_continuing: Callable[[], Awaitable[object]],
    ) -> list[SampledSequence]: ...


class MemberGone(RuntimeError):
    """The server ended or stopped answering while it worked on a group. The group moves to another server."""


class Member:
    """A server from the time its address is read until it is withdrawn, identified by (index, start)."""

    def __init__(self, address: ServerAddress, client: Client) -> None:
        self.address = address
        self.client = client
        self.name = client.name
        self.held_version: int | None = None  # None: not known to hold the weights of any version
        self.named_version: int | None = None  # reported by the trainer as sent, not yet confirmed by the server
        self.has_joined = False  # it has answered once
        self.answers = False  # whether it answered the last check
        self.restart_requested = False  # `serve` was asked to restart it
        self.answered_at = time.monotonic()
        self.probed_at = -float("inf")
        self.probe: asyncio.Task[None] | None = None
        self.generation = GenerationWatch()
        self.suspension = Suspension()
        self.rate = ResponseRate()
        self.idle_time = IdleTime()
        self.num_groups = 0  # in flight
        self.num_requests = 0  # of these groups
        self.num_tokens = 0
        self._requests: set[asyncio.Task[list[SampledSequence]]] = set()
        self._is_back = asyncio.Event()  # cleared while the trainer may change its weights
        self._is_back.set()

    @property
    def key(self) -> Key:
        return self.address.index, self.address.start

    async def generate(
        self, prompt_token_ids: np.ndarray, seeds: Sequence[int], sampling: SamplingParameters, policy_version: int
    ) -> list[SampledSequence]:
        """The client's answer. Raises MemberGone if the server leaves the fleet before it has answered, or is leased
        meanwhile and does not hold the lease's weights afterwards."""
        request = asyncio.create_task(self._answer(prompt_token_ids, seeds, sampling, policy_version))
        self._requests.add(request)
        request.add_done_callback(self._requests.discard)
        try:
            await asyncio.wait({request})
        finally:
            request.cancel()  # no effect on one that has ended
        if request.cancelled():
            raise MemberGone(f"{self.name} went away")
        return request.result()

    async def _answer(
        self, prompt_token_ids: np.ndarray, seeds: Sequence[int], sampling: SamplingParameters, policy_version: int
    ) -> list[SampledSequence]:
        start = time.monotonic()
        sequences = await self.client.generate(prompt_token_ids, seeds, sampling, policy_version, self._is_back.wait)
        wall_time_s = time.monotonic() - start
        # Which weights sampled the last tokens is known only then: the version that a server reports may be wrong.
        await self._is_back.wait()
        self.succeeded(sequences, wall_time_s)
        return sequences

    @property
    def is_well(self) -> bool:
        """Whether the server can be given work or weights, as far as is known."""
        return self.has_joined and self.answers and self.generation.is_well and not self.restart_requested

    @property
    def is_lent(self) -> bool:
        """Whether the trainer may change the weights at this time."""
        return not self._is_back.is_set()

    def lend(self) -> None:
        """The trainer may change the weights from now on: answers and continuations wait until `take_back`."""
        self._is_back.clear()
        self.generation.suspend()

    def take_back(self, with_the_weights: bool) -> None:
        """The trainer has finished. If the server did not receive the weights, its requests in flight may have
        continued with unknown weights, so their groups move to other servers."""
        if not with_the_weights:
            self.move_groups()
        self._is_back.set()
        self.generation.resume()

    def move_groups(self) -> None:
        """Cancels all requests in flight; each raises MemberGone where it is awaited."""
        for request in self._requests:
            request.cancel()

    async def close(self) -> None:
        """Cancels the requests in flight, then closes the client."""
        self.move_groups()
        probes = [probe for probe in (self.probe, self.generation.probe) if probe is not None]
        for probe in probes:
            probe.cancel()
        pending = [*self._requests, *probes]
        if pending:
            await asyncio.wait(pending)
        await self.client.__aexit__(None, None, None)

    def take(self, num_requests: int) -> None:
        """Records one more group in flight, with `num_requests` requests."""
        self.num_groups += 1
        self.num_requests += num_requests
        self.idle_time.end()

    def release(self, num_requests: int) -> None:
        """Records the end of a group."""
        self.num_groups -= 1
        self.num_requests -= num_requests
        if self.num_groups == 0:
            self.idle_time.begin()

    def succeeded(self, sequences: Sequence[SampledSequence], wall_time_s: float) -> None:
        """Records a group's tokens and their rate."""
        self.suspension.succeeded()
        self.generation.seen()
        lengths = [len(sequence.token_ids) for sequence in sequences]
        self.num_tokens += sum(lengths)
        self.rate.add(lengths, wall_time_s)


def client_maker(config: RunConfig, facts: ModelFacts, check: Check = check_here) -> Callable[[ServerAddress], Client]:
    """A function that creates clients of the run's servers, which check answers with `check`.

    Raises ValueError if the API key is missing, or if routes are requested from a model without experts.
    """
    headers = authorization(config)
    if config.model.routing_replay == "rollout" and not facts.num_experts:
        raise UserError(
            f"model.routing_replay = 'rollout': model.hf_path = {config.model.hf_path!r} has no experts "
            "(num_experts in config.json); set model.routing_replay to 'none'"
        )

    def make(address: ServerAddress) -> Client:
        return ServerClient(
            address,
            facts,
            config.server.request_timeout_s,
            headers=headers,
            exact_versions=config.staleness.mode == "delay",
            check=check,
        )

    return make
