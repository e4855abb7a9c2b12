"""The publication of one version to the servers of a lease, on rank 0: which servers are paused, have the version, or
are excluded and why.

A server may die, hang or refuse at any request. It is then excluded, with a line that states the reason, and the
publication continues with the others: the collector, which granted the lease, sends no requests to servers that do not
have the version.
"""

import logging
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from minpro_megatron.config.publish import PublishConfig
from minpro_megatron.publishing.canary import Difference
from minpro_megatron.publishing.sender import PublishError, Sender, Transport
from minpro_megatron.records import PublishLease
from minpro_megatron.serving.calls import PendingCalls, ServersFailed, for_all, start_for_all
from minpro_megatron.serving.control import GreedyAnswer, ServerControl, WeightsChecksum

log = logging.getLogger(__name__)

MAX_TRANSFERS = 3  # before the transport "disk" is used
# A larger mean difference is logged with the server's name: engines in bfloat16 differ by about 0.01.
NOTED_CANARY_NATS = 0.1
# The version of a server's weights until the last bucket has arrived. Policy versions have at most nine digits (see
# serving/answers.py), so tokens that are sampled with such weights after a failed publication are refused everywhere.
# It is greater than every policy version: to other clients the server seems newer, not to have lost its weights.
INCOMPLETE = 9_999_999_999


@dataclass(frozen=True)
class Limits:
    """Time limits of requests that depend neither on the model nor on `publish.timeout_s`, in seconds."""

    probe_s: float = 5.0  # for a server to answer that it is alive
    clean_up_s: float = 10.0
    # For a server to compute the checksum of its weights after a failed transfer: seconds for the largest models.
    proof_s: float = 120.0
    # For a request that transfers no weights. A server needs a fraction of a second for it; one that takes this long
    # hangs, and with publish.timeout_s the trainer would wait for it as long as for the transfer of a large model.
    quick_request_s: float = 60.0
    # With requests in flight a canary waits behind them. The checksum and version of such a busy server are known.
    canary_patience_s: float = 20.0


@dataclass
class Delivery:
    """The state of the publication of one version; see the module."""

    settings: PublishConfig
    lease: PublishLease
    controls: dict[int, ServerControl]  # of the servers without a failure so far, by index
    sender: Sender
    transport: Transport | None  # of the next transfer; None: no transfer is needed
    # the checksums of this version on other servers, by tensor-parallel size; None: the version is new. If others have
    # the version already, a fault is the server's own: it is excluded, and the run continues.
    published: dict[int, str] | None = None
    limits: Limits = field(default_factory=Limits)
    failures: dict[int, str] = field(default_factory=dict)  # one line per excluded server
    late: set[int] = field(default_factory=set)  # the excluded servers that hang or are broken: they are restarted
    num_bytes: int = 0
    transfer_s: float = 0.0
    paused_s: float = 0.0
    checksums: dict[int, str] = field(
        default_factory=dict
    )  # by tensor-parallel size: different shards have different checksums
    canaries: dict[int, list[GreedyAnswer]] = field(
        default_factory=dict
    )  # one answer per prompt of the lease, by server
    used: Transport | None = None
    _transfers: int = 0
    _paused_at: float | None = None
    _has_cache: bool = True
    _loaded: Transport | None = None  # on shared GPUs: by which the weights have come, while the cache has no memory
    _excluded: list[ServerControl] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.controls:
            self.transport = None

    def take_back(self) -> None:
        """On shared GPUs, before the first transfer: the servers get memory for weights, and with `give_cache` for the
        cache after it."""
        self._each("resume_memory_occupation", tags=["weights"])
        self._has_cache = False
        if not self.controls:
            self.transport = None

    def give_cache(self) -> Transport | None:
        """On shared GPUs, once no rank of the trainer holds memory of the transfer any more: the servers get memory for
        their cache, and their weights are verified. Returns the transport of the next transfer, if one is needed."""
        if self._loaded is not None:
            used, self._loaded, self._has_cache = self._loaded, None, True
            self._each("resume_memory_occupation", tags=["kv_cache"])
            self._each("continue_generation", quick=True)
            self._conclude(used)
        return self.transport

    def by_buckets(self, buckets: Iterable[Sequence[tuple[str, Tensor]]], num_buckets: int) -> None:
        """Sends the buckets to all servers. If one server fails, the transfer has failed for all and must be repeated
        with those that are alive: see `transport`."""
        self._transfers += 1
        try:
            self._pause()
            self._begin()
            self.sender.connect(self.controls)
            start, remaining, num_bytes = time.monotonic(), num_buckets, 0
            for bucket in buckets:
                remaining -= 1
                self.sender.send(bucket, INCOMPLETE if remaining else self.lease.version)
                num_bytes += sum(tensor.nbytes for _, tensor in bucket)
                del bucket  # its bytes are copied: the tensors are released before the next bucket is gathered
            self.sender.finish()
            self.num_bytes, self.transfer_s = num_bytes, time.monotonic() - start
            for_all(self.controls.values(), "end_weight_update")
        except ServersFailed as error:
            self._after_failed_transfer(error)
        else:
            self._conclude(self.settings.transport)

    def from_disk(self, folder: Path, num_bytes: int, written_s: float) -> None:
        """Requests all servers to load the Hugging Face folder, which took `written_s` to write. A server that fails is
        excluded. Raises PublishError if all servers that are alive refuse a new version."""
        start = time.monotonic()
        asked = list(self.controls)
        if self._must_pause():
            self._each("pause_generation", quick=True, mode=self.settings.pause_mode)
        what = {"model_path": str(folder), "weight_version": self.lease.version, "flush_cache": False}
        self._each("update_weights_from_disk", **what)
        self.num_bytes, self.transfer_s = num_bytes, written_s + time.monotonic() - start
        if not self.controls and self.published is None and self._any_alive():
            raise PublishError(
                f"publishing version {self.lease.version}: no server loads {folder}: {self._lines(asked)}. Can they "
                "read this folder, and does it contain their model?"
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
                self._exclude(index, f"{line} (publish.canary_tolerance = {tolerance:g})")
            elif found.mean > NOTED_CANARY_NATS:
                log.warning("version %d: server %d: %s", self.lease.version, index, line)
        if off and len(off) == len(differences) and self.published is None:
            raise PublishError(
                f"publishing version {self.lease.version}: {self._lines(off)}. All checksums are equal, so "
                "the servers have the same weights but compute other log-probs from them than the trainer: compare "
                "the model's config.json, sampling.temperature and the two dtypes, or raise publish.canary_tolerance"
            )

    def ask_canaries(self, num_tokens: int, temperature: float) -> None:
        """Sets `canaries`: each server's continuations of the lease's prompts, `num_tokens` tokens each. All are
        requested at once; a server that does not answer all of them is not included."""
        self.canaries = {}
        if not (num_tokens and self.lease.canary_prompts):
            return
        patience_s = self.limits.canary_patience_s if self.lease.requests_in_flight else self.settings.timeout_s
        controls = _within(patience_s, self.controls.values())
        asked = {"num_tokens": num_tokens, "temperature": temperature}
        prompts = self.lease.canary_prompts
        calls = [start_for_all(controls, "generate_greedy", token_ids=prompt, **asked) for prompt in prompts]
        answers = [call.results() for call in calls]
        complete = set.intersection(*(set(of_prompt) for of_prompt in answers))
        self.canaries = {index: [of_prompt[index] for of_prompt in answers] for index in sorted(complete)}
        failures = {index: line for call in reversed(calls) for index, line in call.failures().items()}
        late = {index for call in calls for index in call.late()}
        for index, line in failures.items():
            if not (self.lease.requests_in_flight and index in late):
                self._exclude(index, line, is_late=index in late)

    def close(self) -> None:
        """Aborts the requests of excluded servers, whose weights are not verified, and leaves no server paused. Best
        effort: excluded servers may be dead."""
        if self.lease.requests_in_flight:
            left_out = _within(self.limits.clean_up_s, self._excluded)
            start_for_all(left_out, "abort_all_requests").results()
            paused = [] if self._paused_at is None else _within(self.limits.clean_up_s, self.controls.values())
            start_for_all([*left_out, *paused], "continue_generation").results()

    # Everything below is part of a transfer.

    def _must_pause(self) -> bool:
        if not self.lease.requests_in_flight or self._paused_at is not None:
            return False
        self._paused_at = time.monotonic()
        return True

    def _pause(self) -> None:
        if self._must_pause():
            calls = start_for_all(self._quick(), "pause_generation", mode=self.settings.pause_mode)
            self._exclude_late(calls)
            if failed := {index: line for index, line in calls.failures().items() if index in self.controls}:
                raise ServersFailed(failed)

    def _quick(self) -> list[ServerControl]:
        return [control.at_most(self.limits.quick_request_s) for control in self.controls.values()]

    def _exclude_late(self, calls: PendingCalls) -> None:
        """Excludes the servers that did not answer in time: every later request would wait as long for them."""
        calls.results()
        failed = calls.failures()
        for index in calls.late():
            self._exclude(index, failed[index], is_late=True)
        if not self.controls:
            raise ServersFailed(failed)

    def _begin(self) -> None:
        calls = start_for_all(self._quick(), "begin_weight_update")
        self._exclude_late(calls)
        failed, late = calls.failures(), calls.late()
        # a publication that was interrupted, perhaps of another trainer, leaves its session open
        again = [self.controls[index] for index in failed if index not in late]
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
            self._each("flush_cache", quick=True)
        if self._paused_at is not None:
            self._each("continue_generation", quick=True)
            self.paused_s += time.monotonic() - self._paused_at
            self._paused_at = None
        for index, version in self._each("policy_version", quick=True).items():
            if version != self.lease.version:
                self._exclude(index, f"it reports version {version} after loading version {self.lease.version}")
        self._compare_checksums(self._each("weights_checksum"))

    def _compare_checksums(self, found: Mapping[int, WeightsChecksum]) -> None:
        sums = {index: found[index].engine for index in self.controls}
        right = self._right_checksums(sums)
        wrong = [index for index in sums if right.get(self._tensor_parallel(index)) != sums[index]]
        shown = ", ".join(f"server {index}: {checksum[:12]}" for index, checksum in sums.items())
        if wrong and self.used != "disk":
            log.warning("version %d: wrong weights (checksums %s); sending again, by disk", self.lease.version, shown)
            self.transport = "disk"
            return
        if len(right) < len({self._tensor_parallel(index) for index in sums}):
            raise PublishError(
                f"publishing version {self.lease.version}: after a second transfer the servers still have different "
                f"weights (checksums {shown}): do they have the same SGLang version, dtype and model?"
            )
        for index in wrong:
            self._exclude(index, f"after a second transfer its weights differ from the others (checksums {shown})")
        self.checksums = right

    def _right_checksums(self, sums: Mapping[int, str]) -> dict[int, str]:
        """By tensor-parallel size: the checksum of servers that have this version already, or else that of more than
        half of the servers of that size; a size without such a checksum is not included."""
        by_size: dict[int, list[str]] = {}
        for index, checksum in sums.items():
            by_size.setdefault(self._tensor_parallel(index), []).append(checksum)
        right = {}
        for size, found in by_size.items():
            checksum, count = Counter(found).most_common(1)[0]
            if count > len(found) / 2:
                right[size] = checksum
        return right | {size: known for size, known in (self.published or {}).items() if size in by_size}

    def _each(self, method: str, *, quick: bool = False, **arguments: Any) -> dict[int, Any]:
        """The results by server; servers that fail are excluded. `quick`: see Limits.quick_request_s."""
        calls = start_for_all(self._quick() if quick else self.controls.values(), method, **arguments)
        results, late = calls.results(), calls.late()
        for index, line in calls.failures().items():
            self._exclude(index, line, is_late=index in late)
        return results

    def _exclude(self, index: int, line: str, is_late: bool = False) -> None:
        control = self.controls.pop(index)
        self._excluded.append(control)
        if is_late:
            self.late.add(index)
        at = f"server {index} at {control.address.url}"
        self.failures[index] = line if line.startswith(at) else f"{at}: {line}"
        log.warning("version %d: excluded: %s", self.lease.version, self.failures[index])

    def _after_failed_transfer(self, error: ServersFailed) -> None:
        """Resets the servers that can continue, so that a transfer may start, and decides how it is repeated."""
        self.sender.close()
        dead = self._failing("model_info", self.limits.probe_s)
        for index in dead:
            self._exclude(index, error.failures.get(index, dead[index]))
        calls = start_for_all(_within(self.limits.clean_up_s, self.controls.values()), "end_weight_update")
        calls.results()
        failed = calls.failures()
        # A server that refuses has no session open. A server answers /model_info even while its weight process waits
        # for a bucket that will never arrive; only a checksum request waits for the GPU.
        stuck = {index: failed[index] for index in calls.late()}
        stuck |= self._failing("weights_checksum", self.limits.proof_s, but=stuck)
        for index, line in stuck.items():
            self._exclude(index, f"{line}, after a failed transfer; it is restarted", is_late=True)
        failing = dead | stuck
        refusing = {index: line for index, line in error.failures.items() if index in self.controls}
        # If most refuse, the transport is at fault. One faulty server must not make all of them load from disk.
        if not failing and len(refusing) <= len(self.controls) / 2 and self._transfers < MAX_TRANSFERS:
            failing = refusing
            for index, line in refusing.items():
                self._exclude(index, line)
        lines = "; ".join(error.failures.values())
        if not self.controls:
            self.transport = None
        elif failing and self._transfers < MAX_TRANSFERS:
            log.warning("version %d: sending again without server %s", self.lease.version, sorted(failing))
        else:
            log.warning("version %d: transfer failed, servers load from disk: %s", self.lease.version, lines)
            self.transport = "disk"

    def _failing(self, method: str, limit_s: float, but: Container[int] = ()) -> dict[int, str]:
        """The servers that fail at `method` or do not answer it in time, except those in `but`."""
        asked = [control for index, control in self.controls.items() if index not in but]
        calls = start_for_all(_within(limit_s, asked), method)
        calls.results()
        return calls.failures()

    def _any_alive(self) -> bool:
        calls = start_for_all(_within(self.limits.probe_s, self._excluded), "model_info")
        return bool(calls.results())

    def _tensor_parallel(self, index: int) -> int:
        return self.controls[index].address.tensor_parallel

    def _lines(self, indices: Iterable[int]) -> str:
        return "; ".join(self.failures[index] for index in indices)


def _within(timeout_s: float, controls: Iterable[ServerControl]) -> list[ServerControl]:
    return [control.within(timeout_s) for control in controls]
