"""Decides when the run saves, and when a start of the run ends before the run is complete. Rank 0 decides this at the
end of global steps."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from minpro_megatron.buffer.staleness import evaluated_versions
from minpro_megatron.config.run import RunConfig

# The expected time of the next global step and its checkpoint is this factor times the slowest recent one.
MARGIN = 1.25
NUM_RECENT = 8


class EndedEarly(Exception):
    """The start ends although the run is not complete: its checkpoint is saved, and the next start resumes from it."""

    def __init__(self, version: int, reason: str) -> None:
        super().__init__(f"ends after global step {version}: {reason}")
        self.version, self.reason = version, reason


@dataclass(frozen=True)
class Decision:
    """What happens after a global step. `end`: why this start ends now; "" if it continues."""

    save: bool
    end: str = ""


@dataclass
class SaveSchedule:
    """`save_by`: Unix time by which the last checkpoint of this start must be complete, None without a time limit.
    `stop_request`: the reason of a request to stop, None without a request. `clock`: Unix time in seconds."""

    config: RunConfig
    save_by: float | None = None
    stop_request: Callable[[], str | None] = lambda: None
    clock: Callable[[], float] = time.time
    _last_save: float = 0.0
    _step_began: float = 0.0
    # seconds of recent steps: those that wait for an evaluation, and the others
    _steps: dict[bool, deque[float]] = field(
        default_factory=lambda: {waits: deque(maxlen=NUM_RECENT) for waits in (False, True)}
    )
    _saves: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))

    def __post_init__(self) -> None:
        num_steps, every_steps = self.config.num_global_steps, self.config.evaluation.every_steps
        self._evaluated = frozenset(evaluated_versions(num_steps, every_steps))

    def begin(self) -> None:
        """Called when the first global step of this start begins."""
        self._last_save = self._step_began = self.clock()

    def saved(self, seconds: float) -> None:
        """Called when a checkpoint is complete, `seconds` after the start of its save."""
        self._saves.append(seconds)

    def after_step(self, version: int) -> Decision:
        """What to do after global step `version` - 1."""
        now, settings = self.clock(), self.config.checkpoint
        # a version is published once the evaluation of the previous version has ended
        self._steps[version - 1 in self._evaluated].append(now - self._step_began)
        self._step_began = now
        if version == self.config.num_global_steps:
            decision = Decision(save=settings.at_end or self._is_due(version, now))
        else:
            end = self._reason_to_end(version, now) if settings.saves_before_end else ""
            decision = Decision(save=bool(end) or self._is_due(version, now), end=end)
        if decision.save:
            self._last_save = now
        return decision

    def _is_due(self, version: int, now: float) -> bool:
        settings = self.config.checkpoint
        by_steps = settings.every_steps > 0 and version % settings.every_steps == 0
        by_time = settings.every_minutes > 0 and now - self._last_save >= 60 * settings.every_minutes
        return by_steps or by_time

    def _reason_to_end(self, version: int, now: float) -> str:
        request = self.stop_request()
        if request is not None:
            return request
        if self.save_by is None:
            return ""
        step_s = self._expected_step_s(version)
        save_s = max(self._saves) if self._saves else step_s  # not measured yet: estimated as the time of a step
        left_s = self.save_by - now
        if left_s >= MARGIN * (step_s + save_s):
            return ""
        return (
            f"the time limit leaves {left_s:.0f} s, and another global step may take {step_s:.0f} s and its "
            f"checkpoint {save_s:.0f} s"
        )

    def _expected_step_s(self, version: int) -> float:
        """The expected time of the global step that starts at `version`: the longest of its kind, or of all steps if no
        step of its kind is known."""
        of_kind = self._steps[version in self._evaluated] or [*self._steps[False], *self._steps[True]]
        return max(of_kind)
