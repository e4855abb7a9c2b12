"""Publishing: sends the trainer's weights as a new policy version to every rollout server that is alive."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from minpro_megatron.config.publish import PublishConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.publishing.broadcast import Broadcaster
from minpro_megatron.publishing.canary import Continuation, differences, distinct_continuations
from minpro_megatron.publishing.canary_count import continuation_tokens
from minpro_megatron.publishing.delivery import Delivery
from minpro_megatron.publishing.gather import WeightGatherer
from minpro_megatron.publishing.held_weights import HeldWeights, held_weights
from minpro_megatron.publishing.initial_weights import refuse_other_weights
from minpro_megatron.publishing.publish_report import PublishReport
from minpro_megatron.publishing.receivers import Limits, Receivers
from minpro_megatron.publishing.sender import PublishError, Sender, Transport
from minpro_megatron.publishing.shared_memory import SharedMemorySender
from minpro_megatron.publishing.transport_choice import Tried, first_transport
from minpro_megatron.records import PublishLease
from minpro_megatron.serving.api_key import authorization
from minpro_megatron.serving.control import ServerControl
from minpro_megatron.weights.hf_files import write_hf

log = logging.getLogger(__name__)

PUBLISHED = "published"  # the folder of run_dir for transport "disk"

# The trainer's log-probs of the tokens of each (prompt, response), under its current weights. Collective.
ScoreCanaries = Callable[[list[tuple[list[int], list[int]]]], list[np.ndarray]]


class Publisher:
    """Sends the model to the servers, one bucket at a time. All ranks take part; rank 0 sends to the servers."""

    def __init__(
        self,
        config: RunConfig,
        gatherer: WeightGatherer,
        mesh: Mesh,
        score_canaries: ScoreCanaries,
        limits: Limits | None = None,
    ) -> None:
        self._config = config
        self._gatherer = gatherer
        self._mesh = mesh
        self._score_canaries = score_canaries
        self._sender = make_sender(config.publish, mesh.device)
        self._headers = authorization(config) if mesh.rank == 0 else {}
        self._limits = limits or Limits()
        self._published: HeldWeights | None = None  # after the last publication
        self._tried: list[Tried] = []  # by the publications so far
        # checksums of what servers loaded from model.hf_path, by tensor-parallel size
        self._loaded: dict[int, str] = {}

    def begin_from(self, held: HeldWeights | None) -> None:
        """Notes what the servers held when they first released their memory, where they share the trainer's GPUs."""
        self._published = held

    def publish(self, lease: PublishLease | None, changed: bool) -> PublishReport | None:
        """Sends the weights as the lease's version to its servers. Collective: `lease` on rank 0, None elsewhere;
        the report on rank 0. `changed`: the weights must differ from those of the version published before.

        A server that fails is excluded, and `held_by` does not name it. Raises PublishError on all ranks if the fault
        is the trainer's: no server accepts the weights or is changed by them, or all compute other log-probs from them.
        """
        start = time.monotonic()
        delivery = None if lease is None else self._delivery(lease)
        try:
            if self._config.server.takes_turns:
                self._on_rank_0(delivery, Delivery.take_back)
            transport: Transport | None = self._on_rank_0(delivery, lambda own: self._first_transport(own, changed))
            while transport is not None:
                used = transport
                buckets = self._gatherer.buckets(self._config.publish.bucket_bytes)
                if delivery is None:
                    _drain(buckets)
                transport = self._on_rank_0(delivery, partial(self._transfer, buckets=buckets))
                if transport is None and self._config.server.takes_turns:
                    transport = self._give_cache(delivery)
                # The same transport is repeated without the servers that failed. Where others hold the version, a fault
                # is that of the servers of the lease, and says nothing about the transport.
                if delivery and transport != used and delivery.published is None:
                    self._tried.append(Tried(used, arrived=transport is None and bool(delivery.receivers.controls)))
            self._on_rank_0(delivery, lambda own: self._check_weights(own, changed))
            prompts, continuations = self._on_rank_0(delivery, self._ask_canaries)
            pairs = [(prompts[prompt], list(response)) for prompt, response in continuations]
            log_probs = self._score_canaries(pairs) if pairs else []
            report = self._on_rank_0(delivery, lambda own: self._report(own, continuations, log_probs, start))
        finally:
            if delivery:
                delivery.close()
        return report if delivery else None

    def close(self) -> None:
        """Closes the servers' update group, if there is one: otherwise they would wait in it, and this process for them
        at exit."""
        self._sender.close()

    def _on_rank_0[Result](self, delivery: Delivery | None, function: Callable[[Delivery], Result]) -> Result:
        """Calls `function` with rank 0's delivery and returns the result on all ranks. Collective; a PublishError is
        raised on all ranks."""
        outcome: Result | PublishError | None = None
        if delivery is not None:
            try:
                outcome = function(delivery)
            except PublishError as error:
                outcome = error
        outcome = self._mesh.from_rank_0(outcome)
        if isinstance(outcome, PublishError):
            raise outcome
        return cast(Result, outcome)

    def _delivery(self, lease: PublishLease) -> Delivery:
        size = read_model_facts(self._config.model.hf_path).vocabulary_size
        timeout_s = self._config.publish.timeout_s
        controls = {server.index: ServerControl(server, timeout_s, size, self._headers) for server in lease.servers}
        published = None
        if self._published is not None and self._published.version == lease.version:
            published = self._published.checksums
        settings = self._config.publish
        transport = first_transport(settings.transport, self._tried)
        if transport != settings.transport and controls:
            log.warning(
                "version %d: servers load from disk: the last publication by publish.transport = %s has failed",
                lease.version,
                settings.transport,
            )
        receivers = Receivers(lease.version, controls, self._limits)
        return Delivery(settings, lease, receivers, self._sender, transport, published)

    def _first_transport(self, delivery: Delivery, changed: bool) -> Transport | None:
        if self._published is None and (changed or delivery.lease.version == 0):
            held = held_weights(delivery.receivers.controls.values())
            if changed:  # the weights must differ from the servers' initial ones
                self._published = held
            elif held and held.version == 0 and not self._config.server.urls:
                self._loaded = held.checksums
        return delivery.transport

    def _transfer(self, delivery: Delivery, buckets: Iterator[list[tuple[str, Tensor]]]) -> Transport | None:
        """Rank 0's part of one transfer; the transport of the next one, if one is needed."""
        try:
            if delivery.transport == "disk":
                self._through_files(delivery, buckets)
            else:
                delivery.by_buckets(buckets, self._gatherer.num_buckets(self._config.publish.bucket_bytes))
        finally:
            _drain(buckets)  # buckets not sent because a server failed: the other ranks still gather them
        return delivery.transport

    def _give_cache(self, delivery: Delivery | None) -> Transport | None:
        """Shared GPUs: the servers get memory for their cache once all ranks' allocators have given back what they keep
        of the transfer. The transport of the next transfer, if one is needed."""
        torch.cuda.empty_cache()
        self._mesh.from_all_ranks(None)
        return self._on_rank_0(delivery, Delivery.give_cache)

    def _through_files(self, delivery: Delivery, buckets: Iterator[list[tuple[str, Tensor]]]) -> None:
        start, num_bytes = time.monotonic(), 0

        def count(tensor_bytes: int) -> None:
            nonlocal num_bytes
            num_bytes += tensor_bytes

        folder = (self._config.run_dir / PUBLISHED).resolve() / f"version-{delivery.lease.version}"
        tensors = (pair for bucket in buckets for pair in bucket)
        try:
            write_hf(tensors, self._config.model.hf_path, folder, announce=count)
        except OSError as error:
            raise PublishError(
                f"publishing version {delivery.lease.version}: {folder} cannot be written: {error}"
            ) from None
        delivery.from_disk(folder, num_bytes, time.monotonic() - start)
        for previous in folder.parent.iterdir():
            if previous != folder:
                shutil.rmtree(previous, ignore_errors=True)

    def _check_weights(self, delivery: Delivery, changed: bool) -> None:
        """Raises PublishError if the servers agree on weights that cannot be this version's."""
        version, checksums = delivery.lease.version, delivery.checksums
        if version == 0:
            refuse_other_weights(self._config, self._loaded, checksums)
        before, known = self._published or HeldWeights(version, {})
        same = [size for size, checksum in checksums.items() if known.get(size) == checksum]
        if changed and version > before and same:
            raise PublishError(
                f"publishing version {version} changed no weight on the servers (checksum {checksums[same[0]]}): do "
                "the tensor names match the servers' model? SGLang ignores unknown names silently"
            )
        if checksums:
            self._published = HeldWeights(version, (known if version == before else {}) | checksums)

    def _ask_canaries(self, delivery: Delivery) -> tuple[list[list[int]], list[Continuation]]:
        """The prompts and the servers' continuations of them, for the trainer's log-probs."""
        prompts = delivery.lease.canary_prompts
        delivery.ask_canaries(continuation_tokens(self._config, len(prompts)), self._config.sampling.temperature)
        return prompts, distinct_continuations(delivery.canaries)

    def _report(
        self, delivery: Delivery, continuations: list[Continuation], log_probs: list[np.ndarray], start: float
    ) -> PublishReport:
        canaries = differences(delivery.canaries, continuations, log_probs)
        delivery.compare(canaries)
        return PublishReport(
            version=delivery.lease.version,
            held_by=sorted(delivery.receivers.controls),
            failures=delivery.receivers.failures,
            transport=delivery.used,
            total_s=time.monotonic() - start,
            paused_s=delivery.paused_s,
            transfer_s=delivery.transfer_s,
            num_bytes=delivery.num_bytes,
            checksum=next(iter(delivery.checksums.values()), ""),
            canaries=canaries,
            late=sorted(delivery.receivers.late),
            fell_back=delivery.used == "disk" != self._config.publish.transport,
        )


def make_sender(settings: PublishConfig, device: torch.device) -> Sender:
    """What sends buckets by the transport of the settings; with disk, nothing is sent by it."""
    return SharedMemorySender() if settings.transport == "shared_memory" else Broadcaster(device, settings.timeout_s)


def _drain(buckets: Iterator[object]) -> None:
    for _ in buckets:
        pass
