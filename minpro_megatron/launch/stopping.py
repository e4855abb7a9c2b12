"""The early end of a start, before the end of the run: by its time limit, or because of a signal."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from minpro_megatron.config.run import RunConfig
from minpro_megatron.run_folder.early_end import EarlyEnd, StopRequest, read_early_end, request_stop

# Time from the trainer's last checkpoint to the end of all processes.
ENDING_S = 15.0
# The time to save, after the SIGTERM that announces the job's end, ends this long before that end.
SIGTERM_RESERVE_S = 60.0
# Slurm may send the signal of --signal up to this long before its time (manual of sbatch).
SIGNAL_IS_EARLY_S = 60.0
# A last checkpoint in progress is finished, independently of checkpoint.save_on_stop_s.
LAST_SAVE_LIMIT_S = 600.0
_LOOK_EVERY_S = 1.0  # the run folder may be on a shared file system


def save_by(config: RunConfig, environment: Mapping[str, str], began: float, end_early_s: float = 0.0) -> float | None:
    """Unix time by which the start that began at `began` must have saved; None if it has no time limit.

    The end of the job is Slurm's SLURM_JOB_END_TIME; all processes get SIGTERM `end_early_s` seconds before it.
    """
    limits = []
    if config.checkpoint.time_limit_minutes:
        limits.append(began + 60 * config.checkpoint.time_limit_minutes)
    if (job_end := _job_end(environment)) is not None:
        limits.append(job_end - end_early_s)
    return min(limits) - ENDING_S if limits else None


def killed_at(environment: Mapping[str, str], end_early_s: float, now: float) -> float | None:
    """Unix time at which the job ends the processes that get SIGTERM `now`; None if it is not known.

    Kubernetes gives them `end_early_s` seconds. Slurm sends SIGTERM that long before the time limit; at any other time
    it comes from `scancel` or a preemption, and what these allow (KillWait, 30 s unless the cluster has another value,
    or GraceTime) the job does not know.
    """
    if not end_early_s:
        return None
    if not _is_in_slurm(environment):
        return now + end_early_s
    end = _job_end(environment)
    return end if end is not None and end_early_s + SIGNAL_IS_EARLY_S >= end - now else None


def _job_end(environment: Mapping[str, str]) -> float | None:
    """The end of the Slurm job by its time limit, Unix time."""
    job_end = environment.get("SLURM_JOB_END_TIME", "")
    return float(job_end) if job_end.isdecimal() and int(job_end) > 0 else None


def _is_in_slurm(environment: Mapping[str, str]) -> bool:
    return "SLURM_JOB_ID" in environment


def _unless_killed(environment: Mapping[str, str]) -> str:
    """Who may kill the processes at a time that is not known, as a clause; empty if nobody does."""
    if _is_in_slurm(environment):
        return ", unless Slurm kills it before (30 s after scancel, or the cluster's KillWait)"
    return ", unless SkyPilot kills it before" if "SKYPILOT_TASK_ID" in environment else ""


def saves_on_request(config: RunConfig) -> bool:
    """Whether the run's trainer saves and ends when a stop is requested."""
    return config.checkpoint.saves_before_end and config.debug.trainer == "megatron"


class Stopping:
    """Detects the early end of a start, and requests it from the trainer when this process gets a signal to stop."""

    def __init__(
        self,
        config: RunConfig,
        incarnation: int,
        end_early_s: float = 0.0,
        environment: Mapping[str, str] = MappingProxyType({}),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`end_early_s`: SIGTERM arrives this many seconds before the end of the job of this `environment`; the trainer
        may use most of them."""
        self._run_dir, self._incarnation = config.run_dir, incarnation
        self._end_early_s, self._environment, self._clock = end_early_s, environment, clock
        self._save_on_stop_s = config.checkpoint.save_on_stop_s
        self._saves = saves_on_request(config)
        self._next_look = 0.0
        self._end: EarlyEnd | None = None

    def allowed_s(self, signal_name: str) -> float:
        """Requests a checkpoint from the trainer. Returns the seconds for which the roles may continue after the
        signal."""
        end = read_early_end(self._run_dir, self._incarnation)
        if end.saved if end else not self._saves:
            return 0.0
        now = self._clock()
        killed = killed_at(self._environment, self._end_early_s, now)
        left_s = math.inf if killed is None else killed - now
        if end is not None:
            what = f"the last checkpoint, after global step {end.policy_version}, is being saved"
            wanted_s = LAST_SAVE_LIMIT_S
        else:
            what = "the trainer finishes its global step and saves"
            wanted_s = self._save_on_stop_s if killed is None else max(self._save_on_stop_s, left_s - SIGTERM_RESERVE_S)
        limit_s = min(wanted_s, left_s - ENDING_S)
        if limit_s <= 0:
            return 0.0
        if end is None:
            request_stop(self._run_dir, self._incarnation, StopRequest(reason=f"stopped by {signal_name}"))
        # Ctrl-C comes from a terminal, and nothing kills after it
        unless = _unless_killed(self._environment) if killed is None and signal_name == "SIGTERM" else ""
        print(
            f"{signal_name}: {what}, for {limit_s:.0f} s at most{unless}; a second signal ends it at once",
            file=sys.stderr,
        )
        return limit_s

    def early_end(self, at_once: bool = False) -> EarlyEnd | None:
        """The start's early end, once the last checkpoint is complete. Checks once per second, unless `at_once`."""
        if at_once or time.monotonic() >= self._next_look:
            self._end = read_early_end(self._run_dir, self._incarnation)
            self._next_look = time.monotonic() + _LOOK_EVERY_S
        return self._end if self._end is not None and self._end.saved else None
