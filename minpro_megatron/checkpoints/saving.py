"""Saves checkpoints at the end of global steps, and ends starts there before the run is complete."""

from collections.abc import Callable, Sequence
from typing import NoReturn

from minpro_megatron.checkpoints.manifest import TrainerState
from minpro_megatron.checkpoints.run_checkpoints import RunCheckpoints, Trainable
from minpro_megatron.checkpoints.save_schedule import EndedEarly, SaveSchedule
from minpro_megatron.config.run import RunConfig
from minpro_megatron.feed.batch_source import BatchSource
from minpro_megatron.monitor.alarms import Alarm, AlarmStop
from minpro_megatron.monitor.phases import PhaseClock
from minpro_megatron.parallel.mesh import Mesh


class Saving:
    """Every method except `decide_with` is collective; only rank 0 has `feed`. Without a schedule nothing is saved."""

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        policy: Trainable,
        checkpoints: RunCheckpoints,
        clock: PhaseClock,
        feed: BatchSource | None = None,
    ) -> None:
        self._config = config
        self._mesh = mesh
        self._policy = policy
        self._checkpoints = checkpoints
        self._clock = clock
        self._feed = feed
        self._schedule: SaveSchedule | None = None
        self._before_early_end: Callable[[int, str], None] = lambda version, reason: None
        self._saved_version: int | None = None  # by this start

    def decide_with(self, schedule: SaveSchedule | None, before_early_end: Callable[[int, str], None]) -> None:
        """On rank 0: sets the schedule that decides for all ranks. `before_early_end` is called with the version and
        the reason before the last save of a start that ends early."""
        self._schedule, self._before_early_end = schedule, before_early_end

    def begin(self) -> None:
        """Called when the first global step of this start begins."""
        if self._schedule:
            self._schedule.begin()

    def after_step(self, state: TrainerState, alarms: Sequence[Alarm]) -> None:
        """Starts a checkpoint of `state` if one is due, and completes earlier ones. `alarms` are those of the global
        step, on rank 0.

        If this start ends now, raises AlarmStop or EndedEarly once the checkpoint is complete. After the run's last
        step its checkpoint is complete too; raises SaveError if it cannot be written.
        """
        version = state.policy_version
        last = version == self._config.num_global_steps
        alarm = self.alarm_to_stop_on(version, alarms)
        decision = self._mesh.from_rank_0(self._schedule.after_step(version) if self._schedule else None)
        end = decision.end if decision and alarm is None else ""
        if end and self._schedule:
            self._before_early_end(version, end)
        saves = alarm is not None or (decision is not None and decision.save)
        with self._clock.phase("checkpoint", guarded=f"the checkpoint of version {version}"):
            if saves:
                self._begin_save(state)
            self._complete(self._checkpoints.poll())
        if last or alarm is not None or end:
            self._finish(state if saves else None)
        if alarm is not None:
            raise AlarmStop(f"alarms.stop_on: {alarm}")
        if end:
            raise EndedEarly(version, end)

    def alarm_to_stop_on(self, version: int, alarms: Sequence[Alarm]) -> Alarm | None:
        """The first of rank 0's alarms that ends the run, on every rank; None after the last version."""
        stop_on = self._config.alarms.stop_on
        if not stop_on or version == self._config.num_global_steps:
            return None
        return self._mesh.from_rank_0(next((alarm for alarm in alarms if alarm.name in stop_on), None))

    def stop(self, state: TrainerState, alarm: Alarm) -> NoReturn:
        """For an alarm that comes after `after_step`: raises AlarmStop once there is a checkpoint of `state`."""
        self._finish(state)
        raise AlarmStop(f"alarms.stop_on: {alarm}")

    def _begin_save(self, state: TrainerState) -> None:
        if self._feed:
            self._feed.checkpoint_begin(state.policy_version)
        self._checkpoints.save(self._policy, state)

    def _complete(self, versions: Sequence[int]) -> None:
        """Called when the checkpoints of these versions are complete."""
        for version in versions if self._feed else []:
            assert self._feed is not None
            self._feed.checkpoint_end(version)
        if versions:
            self._saved_version = versions[-1]
            if self._schedule:
                self._schedule.saved(self._checkpoints.last_save_s)

    def _finish(self, last: TrainerState | None) -> None:
        """Completes the save in progress. If the checkpoint of `last` failed, it is tried a second time, because there
        is no later one."""
        with self._clock.guard("the last checkpoint"):
            self._complete(self._checkpoints.finish())
            if last is not None and self._saved_version != last.policy_version:
                self._begin_save(last)
                self._complete(self._checkpoints.finish())
