"""The publication of one version to the servers of a lease, on rank 0: what they are asked to do, in order, and how a
failed transfer is repeated.

A server may die, hang or refuse at any request. It is then excluded (see receivers.py), and the publication continues
with the others: the collector, which granted the lease, sends no requests to servers that do not have the version.
"""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from minpro_megatron.config.publish import PublishConfig
from minpro_megatron.publishing.canary import Difference
from minpro_megatron.publishing.checksums import right_checksums
from minpro_megatron.publishing.receivers import Receivers, within
from minpro_megatron.publishing.sender import PublishError, Sender, Transport
from minpro_megatron.records import PublishLease
from minpro_megatron.serving.calls import ServersFailed, for_all, start_for_all
from minpro_megatron.serving.control import GreedyAnswer, WeightsChecksum

log = logging.getLogger(__name__)

MAX_TRANSFERS = 3  # before the transport "disk" is used
# A larger mean difference is logged with the server's name: engines in bfloat16 differ by about 0.01.
NOTED_CANARY_NATS = 0.1
# The version of a server's weights until the last bucket has arrived. Policy versions have at most nine digits (see
# serving/answers.py), so tokens that are sampled with such weights after a failed publication are refused everywhere.
# It is greater than every policy version: to other clients the server seems newer, not to have lost its weights.
INCOMPLETE = 9_999_999_999


@dataclass
class Delivery:
    """The state of the publication of one version; see the module."""

    settings: PublishConfig
    lease: PublishLease
    receivers: Receivers
    sender: Sender
    transport: Transport | None  # of the next transfer; None: no transfer is needed
    # the checksums of this version on other servers, by tensor-parallel size; None: the version is new. If others have
    # the version already, a fault is the server's own: it is excluded, and the run continues.
    published: dict[int, str] | None = None
    num_bytes: int = 0
    transfer_s: float = 0.0
    paused_s: float = 0.0
    checksums: dict[int, str] = field(default_factory=dict)  # by tensor-parallel size
    # by server: one answer per prompt of the lease
    canaries: dict[int, list[GreedyAnswer]] = field(default_factory=dict)
    used: Transport | None = None
    _transfers: int = 0
    _paused_at: float | None = None
    _has_cache: bool = True
    _loaded: Transport | None = None  # on shared GPUs: by which the weights have come, while the cache has no memory

    def __post_init__(self) -> None:
        if not self.receivers.controls:
            self.transport = None

    def take_back(self) -> None:
        """On shared GPUs, before the first transfer: the servers get memory for weights, and with `give_cache` for the
        cache after it."""
        self.receivers.each("resume_memory_occupation", tags=["weights"])
        self._has_cache = False
        if not self.receivers.controls:
            self.transport = None

    def give_cache(self) -> Transport | None:
        """On shared GPUs, once no rank of the trainer holds memory of the transfer any more: the servers get memory for
        their cache, and their weights are verified. Returns the transport of the next transfer, if one is needed."""
        if self._loaded is not None:
            used, self._loaded, self._has_cache = self._loaded, None, True
            self.receivers.each("resume_memory_occupation", tags=["kv_cache"])
            self.receivers.each("continue_generation", quick=True)
            self._conclude(used)
        return self.transport

    def by_buckets(self, buckets: Iterable[Sequence[tuple[str, Tensor]]], num_buckets: int) -> None:
        """Sends the buckets to all servers. If one server fails, the transfer has failed for all and must be repeated
        with those that are alive: see `transport`."""
        self._transfers += 1
        try:
            self._pause()
            self._begin()
            self.sender.connect(self.receivers.controls)
            start, remaining, num_bytes = time.monotonic(), num_buckets, 0
            for bucket in buckets:
                remaining -= 1
                self.sender.send(bucket, INCOMPLETE if remaining else self.lease.version)
                num_bytes += sum(tensor.nbytes for _, tensor in bucket)
                del bucket  # its bytes are copied: the tensors are released before the next bucket is gathered
            self.sender.finish()
            self.num_bytes, self.transfer_s = num_bytes, time.monotonic() - start
            for_all(self.receivers.controls.values(), "end_weight_update")
        except ServersFailed as error:
            self._after_failed_transfer(error)
        else:
            self._conclude(self.settings.transport)

    def from_disk(self, folder: Path, num_bytes: int, written_s: float) -> None:
        """Requests all servers to load the Hugging Face folder, which took `written_s` to write. A server that fails is
        excluded. Raises PublishError if all servers that are alive refuse a new version."""
        start = time.monotonic()
        asked = list(self.receivers.controls)
        if self._must_pause():
            self.receivers.each("pause_generation", quick=True, mode=self.settings.pause_mode)
        what = {"model_path": str(folder), "weight_version": self.lease.version, "flush_cache": False}
        self.receivers.each("update_weights_from_disk", **what)
        self.num_bytes, self.transfer_s = num_bytes, written_s + time.monotonic() - start
        if not self.receivers.controls and self.published is None and self.receivers.any_excluded_is_alive():
            raise PublishError(
                f"publishing version {self.lease.version}: no server loads {folder}: {self.receivers.lines(asked)}. "
                "Can they read this folder, and does it contain their model?"
            )
        self._conclude("disk")

    def compare(self, differences: Mapping[int, Difference]) -> None:
        """Excludes the servers whose canaries are clearly wrong. Raises PublishError if all are, for a new version.

        Smaller differences come from the engines and their dtypes; the alarm "canary" detects if they grow.
        """
        tolerance = self.settings.canary_tolerance
        off = {index: found for index, found in differences.items() if not found.mean <= tolerance}
        for index, found in differences.items():
            line = (
                f"canary log-probs differ from the trainer's by {found.mean:.3g} nats per token, "
                f"{found.max:.3g} at most"
            )
            if index in off:
                self.receivers.exclude(index, f"{line} (publish.canary_tolerance = {tolerance:g})")
            elif found.mean > NOTED_CANARY_NATS:
                log.warning("version %d: server %d: %s", self.lease.version, index, line)
        if off and len(off) == len(differences) and self.published is None:
            raise PublishError(
                f"publishing version {self.lease.version}: {self.receivers.lines(off)}. All checksums are equal, so "
                "the servers have the same weights but compute other log-probs from them than the trainer: compare "
                "the model's config.json, sampling.temperature and the two dtypes, or raise publish.canary_tolerance"
            )

    def ask_canaries(self, num_tokens: int, temperature: float) -> None:
        """Sets `canaries`: each server's continuations of the lease's prompts, `num_tokens` tokens each. All are
        requested at once; a server that does not answer all of them is not included."""
        self.canaries = {}
        if not (num_tokens and self.lease.canary_prompts):
            return
        limits, is_busy = self.receivers.limits, self.lease.requests_in_flight
        patience_s = limits.canary_patience_s if is_busy else self.settings.timeout_s
        controls = within(patience_s, self.receivers.controls.values())
        asked = {"num_tokens": num_tokens, "temperature": temperature}
        prompts = self.lease.canary_prompts
        calls = [start_for_all(controls, "generate_greedy", token_ids=prompt, **asked) for prompt in prompts]
        answers = [call.results() for call in calls]
        complete = set.intersection(*(set(of_prompt) for of_prompt in answers))
        self.canaries = {index: [of_prompt[index] for of_prompt in answers] for index in sorted(complete)}
        failures = {index: line for call in reversed(calls) for index, line in call.failures().items()}
        late = {index for call in calls for index in call.late()}
        for index, line in failures.items():
            if not (is_busy and index in late):
                self.receivers.exclude(index, line, is_late=index in late)

    def close(self) -> None:
        """Aborts the requests of excluded servers and leaves no server paused."""
        if self.lease.requests_in_flight:
            self.receivers.leave_none_paused(were_paused=self._paused_at is not None)

    # Everything below is part of a transfer.

    def _must_pause(self) -> bool:
        if not self.lease.requests_in_flight or self._paused_at is not None:
            return False
        self._paused_at = time.monotonic()
        return True

    def _pause(self) -> None:
        if self._must_pause():
            calls = start_for_all(self.receivers.quick(), "pause_generation", mode=self.settings.pause_mode)
            self.receivers.exclude_late(calls)
            failures, left = calls.failures(), self.receivers.controls
            if failed := {index: line for index, line in failures.items() if index in left}:
                raise ServersFailed(failed)

    def _begin(self) -> None:
        calls = start_for_all(self.receivers.quick(), "begin_weight_update")
        self.receivers.exclude_late(calls)
        failed, late = calls.failures(), calls.late()
        # a publication that was interrupted, perhaps of another trainer, leaves its session open
        again = [self.receivers.controls[index] for index in failed if index not in late]
        start_for_all(again, "end_weight_update").results()
        for_all(again, "begin_weight_update")

    def _conclude(self, used: Transport) -> None:
        """After the weights are loaded: flush, continue, and verify the weights of each server."""
        self.used, self.transport = used, None
        settings, in_flight = self.settings, self.lease.requests_in_flight
        if not self._has_cache:
            self._loaded = used
            return
        if settings.flush_cache and not (in_flight and settings.pause_mode == "in_place"):
            self.receivers.each("flush_cache", quick=True)
        if self._paused_at is not None:
            self.receivers.each("continue_generation", quick=True)
            self.paused_s += time.monotonic() - self._paused_at
            self._paused_at = None
        for index, version in self.receivers.each("policy_version", quick=True).items():
            if version != self.lease.version:
                self.receivers.exclude(
                    index, f"it reports version {version} after loading version {self.lease.version}"
                )
        self._compare_checksums(self.receivers.each("weights_checksum"))

    def _compare_checksums(self, found: Mapping[int, WeightsChecksum]) -> None:
        sums = {index: found[index].engine for index in self.receivers.controls}
        sizes = self.receivers.tensor_parallel()
        right = right_checksums(sums, sizes, self.published or {})
        wrong = [index for index in sums if right.get(sizes[index]) != sums[index]]
        shown = ", ".join(f"server {index}: {checksum[:12]}" for index, checksum in sums.items())
        if wrong and self.used != "disk":
            log.warning("version %d: wrong weights (checksums %s); sending again, by disk", self.lease.version, shown)
            self.transport = "disk"
            return
        if len(right) < len(set(sizes.values())):
            raise PublishError(
                f"publishing version {self.lease.version}: after a second transfer the servers still have different "
                f"weights (checksums {shown}): do they have the same SGLang version, dtype and model?"
            )
        for index in wrong:
            line = f"after a second transfer its weights differ from the others (checksums {shown})"
            self.receivers.exclude(index, line)
        self.checksums = right

    def _after_failed_transfer(self, error: ServersFailed) -> None:
        """Resets the servers that can continue, so that a transfer may start, and decides how it is repeated."""
        controls, limits = self.receivers.controls, self.receivers.limits
        self.sender.close()
        dead = self.receivers.failing("model_info", limits.probe_s)
        for index in dead:
            self.receivers.exclude(index, error.failures.get(index, dead[index]))
        calls = start_for_all(within(limits.clean_up_s, controls.values()), "end_weight_update")
        calls.results()
        failed = calls.failures()
        # A server that refuses has no session open. A server answers /model_info even while its weight process waits
        # for a bucket that will never arrive; only a checksum request waits for the GPU.
        stuck = {index: failed[index] for index in calls.late()}
        stuck |= self.receivers.failing("weights_checksum", limits.proof_s, but=stuck)
        for index, line in stuck.items():
            self.receivers.exclude(index, f"{line}, after a failed transfer; it is restarted", is_late=True)
        failing = dead | stuck
        refusing = {index: line for index, line in error.failures.items() if index in controls}
        # If most refuse, the transport is at fault. One faulty server must not make all of them load from disk.
        if not failing and len(refusing) <= len(controls) / 2 and self._transfers < MAX_TRANSFERS:
            failing = refusing
            for index, line in refusing.items():
                self.receivers.exclude(index, line)
        lines = "; ".join(error.failures.values())
        if not controls:
            self.transport = None
        elif failing and self._transfers < MAX_TRANSFERS:
            log.warning("version %d: sending again without server %s", self.lease.version, sorted(failing))
        else:
            log.warning("version %d: transfer failed, servers load from disk: %s", self.lease.version, lines)
            self.transport = "disk"
