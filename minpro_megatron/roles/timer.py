"""The role `timer`: replaces the trainer, takes batches, waits, and publishes versions without weights.

It sends the collector the same requests in the same order as train.Trainer, so servers and collector work as in a real
run whose global step takes debug.timer_step_s in addition to its waiting. With 0 it only collects rollouts.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minpro_megatron.buffer.step_order import Fetch, Publish, Release, Save, StepOrder, Train, steps_ahead
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import SUCCEEDED, ProjectError, report, report_unexpected
from minpro_megatron.feed.answers import answer_to, lease_for, release_for
from minpro_megatron.feed.background import BackgroundScores
from minpro_megatron.feed.batch_source import BatchSource
from minpro_megatron.feed.feed import Feed
from minpro_megatron.metrics.metric import values
from minpro_megatron.models.model_files import read_model_facts
from minpro_megatron.monitor.phases import PhaseClock
from minpro_megatron.monitor.server_use import ServerMeter, ServerUse
from minpro_megatron.monitor.status import write_status
from minpro_megatron.monitor.step_report import StepReport, batch_metrics
from minpro_megatron.monitor.summary import summarize
from minpro_megatron.monitor.writer import RunWriter
from minpro_megatron.prompts.tokenizer import TextTokenizer
from minpro_megatron.records import Batch, BehaviorLogProbs, CollectorTotals, PublishLease, ServerAddress, TrainedStep
from minpro_megatron.report.run_end import record_end
from minpro_megatron.run_folder.start_fence import StartFence
from minpro_megatron.serving.api_key import authorization
from minpro_megatron.serving.calls import start_for_all
from minpro_megatron.serving.control import ControlError, ServerControl

log = logging.getLogger(__name__)

PHASES = ("wait_for_batch", "train", "publish")
PROBE_S = 5.0  # timeout of the health check of a server that did not accept a version


def run(config: RunConfig, incarnation: int) -> int:
    """Takes all batches of the run. Returns 0 when it is finished, 1 after an error that was reported."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s timer %(levelname)s %(message)s")
    fence = StartFence(config.run_dir, incarnation)
    try:
        with fence.explaining():
            _measure(config, incarnation, fence)
    except ProjectError as error:
        return report(error, "timer")
    except Exception:
        return report_unexpected("timer")
    return SUCCEEDED


def _measure(config: RunConfig, incarnation: int, fence: StartFence) -> None:
    started = time.monotonic()
    write_status(config.run_dir, "timer", "waiting for the first batch")
    tokenizer = TextTokenizer(config.model.hf_path, read_model_facts(config.model.hf_path))
    feed = Feed(
        config.run_dir,
        incarnation,
        start_timeout_s=config.server.start_timeout_s,
        hang_timeout_s=config.debug.hang_timeout_s,
    )
    with RunWriter(config.run_dir) as writer:
        timer = Timer(config, BackgroundScores(feed), StepReport(writer, tokenizer.response_text), Announcer(config))
        totals = timer.run()
    fence.check()
    summary = summarize(
        config,
        totals,
        steps=config.num_global_steps,
        updates=0,
        wall_time_s=time.monotonic() - started,
        wall_time_by_phase_s=timer.seconds,
        hf_export=None,
        servers=timer.server_use(),
    )
    record_end(config.run_dir, summary)
    write_status(config.run_dir, "timer", "finished")


class Announcer:
    """Sets the policy version that servers report; their weights remain the initial ones."""

    def __init__(self, config: RunConfig) -> None:
        self._timeout_s = config.publish.timeout_s
        self._flush = config.publish.flush_cache
        self._headers = authorization(config)

    def __call__(self, lease: PublishLease) -> list[int]:
        """The indices of the servers that report the lease's version. Raises ControlError if none does although one is
        alive."""
        controls = {server.index: self._control(server) for server in lease.servers}
        failures: dict[int, str] = {}
        requests: list[tuple[str, dict[str, Any]]] = [("update_weight_version", {"weight_version": lease.version})]
        if (
            self._flush and not lease.requests_in_flight
        ):  # as with new weights: otherwise repeated prompts would cost too little
            requests.append(("flush_cache", {}))
        for method, arguments in requests:
            calls = start_for_all([controls[i] for i in controls if i not in failures], method, **arguments)
            calls.results()
            failures |= calls.failures()
        for line in failures.values():
            log.warning("version %d: excluded servers: %s", lease.version, line)
        held_by = [index for index in controls if index not in failures]
        if not held_by:
            alive = start_for_all([control.within(PROBE_S) for control in controls.values()], "model_info").results()
            if alive:
                raise ControlError(f"no server accepts version {lease.version}: {'; '.join(failures.values())}")
        return held_by

    def _control(self, server: ServerAddress) -> ServerControl:
        return ServerControl(server, self._timeout_s, headers=self._headers)


@dataclass
class Timer:
    """One run of the timer. `announce` returns the indices of the servers that report the lease's version."""

    config: RunConfig
    feed: BatchSource
    report: StepReport
    announce: Callable[[PublishLease], list[int]]
    # Seconds from the possible start of a batch's sampling, or from the end of the previous batch, to its end as it is
    # known here: an upper bound for a batch that was complete before it was asked for.
    batch_seconds: list[float] = field(default_factory=list)
    _ready: dict[int, Batch] = field(default_factory=dict)
    _num_complete: int = 0  # batches that are known to be sampled
    _sampling_since: float = 0.0
    _clock: PhaseClock = field(default_factory=lambda: PhaseClock(PHASES))
    _meter: ServerMeter | None = None
    _publication: dict[str, float] = field(default_factory=dict)  # metrics of the last lease

    def run(self) -> CollectorTotals:
        """Takes the batches of all global steps from the first one, because launch refuses to resume a measurement."""
        self.feed.start(0)
        self._sampling_since = time.monotonic()
        self._meter = ServerMeter(self._sampling_since)
        ahead, in_turns = steps_ahead(self.config.staleness), self.config.server.takes_turns
        order = StepOrder(self.config.num_global_steps, ahead, in_turns=in_turns)
        for fetch in order.before_first_step():
            self._fetch_and_score(fetch)
        for step in order.steps:
            self._clock.lap()
            for event in order.of_step(step):
                match event:
                    case Release(version):
                        self._wait_for_turn(version)
                    case Fetch():
                        self._fetch_and_score(event)
                    case Train():
                        self._consume(step)
                    case Publish(version):
                        self._publish(version)
                    case Save():
                        self._write(step)
        return self._finish()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each phase."""
        return self._clock.seconds

    def server_use(self) -> ServerUse | None:
        return self._meter.use(self.batch_seconds) if self._meter else None

    @property
    def _delay_mode(self) -> bool:
        return self.config.staleness.mode == "delay"

    def _wait_for_turn(self, version: int) -> None:
        """The servers only wait: their weights, which nobody would send to them again, remain in their memory."""
        with self._clock.phase("wait_for_batch"):
            release_for(lambda: self.feed.release_begin(version), self._send)

    def _fetch_and_score(self, fetch: Fetch) -> None:
        index = fetch.batch
        with self._clock.phase("wait_for_batch"):
            batch = answer_to(lambda: self.feed.batch(index), self._send)
        self._note_complete(index)
        if not all(group.is_scored for group in batch.groups):
            version = fetch.version if self._delay_mode else -1
            log_probs = [[response.rollout_log_probs for response in group.responses] for group in batch.groups]
            self.feed.scored(BehaviorLogProbs(index=index, policy_version=version, log_probs=log_probs))
        self._ready[index] = batch

    def _note_complete(self, batch: int) -> None:
        """The batch is sampled."""
        if batch < self._num_complete:
            return
        self._num_complete = batch + 1
        now = time.monotonic()
        self.batch_seconds.append(now - self._sampling_since)
        self._sampling_since = now

    def _consume(self, step: int) -> None:
        with self._clock.phase("train"):
            time.sleep(self.config.debug.timer_step_s)
        self.feed.consumed(TrainedStep(step=step, policy_version=step))

    def _publish(self, version: int) -> None:
        with self._clock.phase("wait_for_batch"):
            lease = lease_for(version, lambda: self.feed.publish_begin(version), self._send)
        if (
            self._delay_mode
            and (last := version - 1 + steps_ahead(self.config.staleness)) < self.config.num_global_steps
        ):
            self._note_complete(last)  # the version that is replaced has sampled its last batch
        with self._clock.phase("publish"):
            assert self._meter is not None
            self._meter.add(lease.metrics, time.monotonic())
            self._send(lease)
        self._publication = lease.metrics
        self.report.evaluations(lease.evaluations)
        if self._delay_mode:  # the servers have waited for this version; in bounded mode they never wait
            self._sampling_since = time.monotonic()

    def _write(self, step: int) -> None:
        lap, batch = self._clock.lap(), self._ready.pop(step)
        times = {f"time/{phase}_s": seconds for phase, seconds in lap.phases.items() if phase != "train"}
        of_batch = values(batch_metrics(batch, step, self.config.reward.right_reward))
        self.report.step(step, of_batch | times | {"time/step_s": lap.total} | self._publication, {}, batch)

    def _send(self, lease: PublishLease) -> None:
        self.feed.publish_end(lease.version, self.announce(lease))

    def _finish(self) -> CollectorTotals:
        totals = answer_to(self.feed.finish, self._send)
        self.report.finished(totals)
        return totals
