"""The trainer's side of the collector's HTTP interface. Blocking; only the trainer's rank 0 uses it."""

import time
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import NoReturn

import msgspec
import requests

from minpro_megatron import records
from minpro_megatron.errors import ProjectError
from minpro_megatron.feed.protocol import (
    COLLECTOR_ENDPOINT,
    INCARNATION_HEADER,
    LEASE_FIRST,
    LONG_POLL_S,
    NOT_READY,
    TOKEN_HEADER,
    CollectorEndpoint,
    read_token,
)
from minpro_megatron.records import Batch, BehaviorLogProbs, CollectorTotals, PublishLease, TrainedStep

# The collector's own watchdog ends a collector that hangs, and the trainer detects that at once. The trainer's own
# limit is longer by this margin.
WATCHDOG_MARGIN_S = 120.0


class FeedError(ProjectError):
    """The collector refused a request, failed, or has ended; the message is one line with the reason."""


class Feed:
    """The trainer's requests to the collector. `start(v)` is called first. Where the trainer resumes, or the run
    `publishes_at_start`, version v is published next, and servers sample after it. A global step with version v and
    delay n is:

        batch(v + n), scored(...), consumed(...), publish_begin(v + 1), [publish], publish_end(v + 1, servers)

    and before it, where trainer and servers share their GPUs, `release_begin(v), [release], released(v + 1, servers)`.

    Every method blocks until it has its answer, and raises FeedError if there will be none. If a method returns a
    PublishLease instead of the requested record, servers have lost the current version: publish it to them, call
    `publish_end`, and repeat the request.
    """

    def __init__(
        self, run_dir: Path | str, incarnation: int, start_timeout_s: float = 120.0, hang_timeout_s: float = 1800.0
    ) -> None:
        """Waits until the collector has written its address, at most `start_timeout_s` seconds.

        A collector that does not answer a request within `hang_timeout_s` (debug.hang_timeout_s plus a margin, in
        addition to the time that a request may wait for its result) is considered to have failed.
        """
        self._run_dir = Path(run_dir)
        self._answer_timeout_s = LONG_POLL_S + hang_timeout_s + WATCHDOG_MARGIN_S
        self._session = requests.Session()
        self._session.trust_env = False
        self._session.headers[INCARNATION_HEADER] = str(incarnation)
        # A step takes minutes: a connection kept open would often be closed during the next request, and a
        # request that changes the collector's state cannot be repeated without knowing whether the first
        # one arrived.
        self._session.headers["Connection"] = "close"
        self._url = self._wait_for_endpoint(incarnation, start_timeout_s)
        self._session.headers[TOKEN_HEADER] = self._token()

    def _wait_for_endpoint(self, incarnation: int, timeout_s: float) -> str:
        path = self._run_dir / COLLECTOR_ENDPOINT
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                endpoint = msgspec.json.decode(path.read_bytes(), type=CollectorEndpoint)
                if endpoint.incarnation == incarnation:
                    return endpoint.url
            except FileNotFoundError:
                pass
            if time.monotonic() > deadline:
                raise FeedError(
                    f"{path}: no collector of incarnation {incarnation} within {timeout_s:g} s; "
                    f"see its log under {self._run_dir / 'logs'}"
                )
            time.sleep(0.1)

    def _token(self) -> str:
        try:
            return read_token(self._run_dir)
        except OSError as error:
            raise FeedError(f"{error.filename}: {error.strerror}; trainer and collector must run as one user") from None

    def start(self, version: int) -> None:
        """Reports that the trainer starts from the weights of `version`; waits until the collector is ready."""
        self._poll("POST", f"start/{version}")

    def batch(self, index: int) -> Batch | PublishLease:
        """The groups that global step `index` consumes, sampled and rewarded. They include their behavior log-probs if
        an earlier incarnation of the run has scored them."""
        return self._record("GET", f"batch/{index}", Batch)

    def scored(self, scores: BehaviorLogProbs) -> None:
        """Sends a batch's behavior log-probs, once; without them the batch cannot be consumed."""
        self._send("POST", "scored", records.encode(scores))

    def consumed(self, trained: TrainedStep) -> None:
        """Reports that a step has trained on its batch."""
        self._send("POST", "consumed", records.encode(trained))

    def release_begin(self, version: int) -> PublishLease:
        """Shared GPUs: waits until all work of `version` has ended, and returns the lease of the version that follows.
        The servers' memory may be released until `publish_end`. A lease that does not `releases` comes before it, for
        servers that have lost `version`."""
        return self._record("POST", f"release_begin/{version}", PublishLease)

    def released(self, version: int, servers: Sequence[int]) -> None:
        """Reports which servers have released their memory for the lease of `version`. Returns once the others are
        gone: the memory is the trainer's."""
        self._send("POST", f"released/{version}", msgspec.json.encode({"servers": list(servers)}))

    def publish_begin(self, version: int) -> PublishLease:
        """Waits until the servers may receive new weights, and returns the lease for them. If servers have lost an
        earlier version, the lease of that version is returned first."""
        return self._record("POST", f"publish_begin/{version}", PublishLease)

    def publish_end(self, version: int, held_by: Sequence[int], late: Sequence[int] = ()) -> None:
        """Reports which servers now hold `version`, so that they generate again, and which answered late, so that they
        are restarted."""
        body = msgspec.json.encode({"held_by": list(held_by), "late": list(late)})
        self._send("POST", f"publish_end/{version}", body)

    def checkpoint_begin(self, version: int) -> None:
        """Returns when everything that the checkpoint of `version` relies on would survive a power cut."""
        self._send("POST", f"checkpoint_begin/{version}")

    def checkpoint_end(self, version: int) -> None:
        """Reports that the run can resume from the checkpoint of `version`."""
        self._send("POST", f"checkpoint_end/{version}")

    def finish(self) -> CollectorTotals | PublishLease:
        """Waits for the last evaluation; the collector ends after its answer."""
        return self._record("POST", "finish", CollectorTotals)

    def close(self) -> None:
        self._session.close()

    def _record[RecordType](self, method: str, path: str, kind: type[RecordType]) -> RecordType | PublishLease:
        response = self._poll(method, path)
        return records.decode(PublishLease if response.status_code == LEASE_FIRST else kind, response.content)

    def _poll(self, method: str, path: str) -> requests.Response:
        while True:
            response = self._send(method, path)
            if response.status_code != NOT_READY:
                return response

    def _send(self, method: str, path: str, body: bytes | None = None) -> requests.Response:
        try:
            # A separate connect limit would also apply to sending the body, and a batch's scores are hundreds of MB.
            response = self._session.request(
                method, f"{self._url}/v1/{path}", data=body, timeout=self._answer_timeout_s
            )
        except requests.RequestException as error:
            self._fail(path, f"the collector at {self._url} does not answer ({type(error).__name__})", error)
        if response.status_code >= HTTPStatus.MULTIPLE_CHOICES:
            self._fail(path, response.text.strip() or f"status {response.status_code}", None)
        return response

    def _fail(self, path: str, reason: str, cause: BaseException | None) -> NoReturn:
        raise FeedError(f"{path}: {reason}; see the log of collect under {self._run_dir / 'logs'}") from cause
