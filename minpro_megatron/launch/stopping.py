"""The early end of a start, before the end of the run: by its time limit, or because of a signal."""

import sys
import time
from collections.abc import Mapping

from minpro_megatron.config.run import RunConfig
from minpro_megatron.run_folder.early_end import EarlyEnd, StopRequest, read_early_end, request_stop

# Time from the trainer's last checkpoint to the end of all processes.
ENDING_S = 15.0
# After Slurm's SIGTERM, the time to save is slurm.end_early_s minus this.
SIGTERM_RESERVE_S = 60.0
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
    job_end = environment.get("SLURM_JOB_END_TIME", "")
    if job_end.isdecimal() and int(job_end) > 0:
        limits.append(int(job_end) - end_early_s)
    return min(limits) - ENDING_S if limits else None


class Stopping:
    """Detects the early end of a start, and requests it from the trainer when this process gets a signal to stop."""

    def __init__(self, config: RunConfig, incarnation: int, end_early_s: float = 0.0) -> None:
        """`end_early_s`: SIGTERM arrives this many seconds before the job's end; the trainer may use most of them."""
        self._run_dir, self._incarnation = config.run_dir, incarnation
        settings = config.checkpoint
        saves = settings.saves_before_end and config.debug.trainer == "megatron"
        self._allowed_s = max(settings.save_on_stop_s, end_early_s - SIGTERM_RESERVE_S, 0.0) if saves else 0.0
        self._next_look = 0.0
        self._end: EarlyEnd | None = None

    def allowed_s(self, signal_name: str) -> float:
        """Requests a checkpoint from the trainer. Returns the seconds for which the roles may continue after the
        signal."""
        end = read_early_end(self._run_dir, self._incarnation)
        if end is None and self._allowed_s:
            request_stop(self._run_dir, self._incarnation, StopRequest(reason=f"stopped by {signal_name}"))
            what = "the trainer finishes its global step and saves"
        elif end is not None and not end.saved:
            what = f"the last checkpoint, after global step {end.policy_version}, is being saved"
        else:
            return 0.0
        limit_s = max(self._allowed_s, LAST_SAVE_LIMIT_S if end else 0.0)
        print(f"{signal_name}: {what}, for {limit_s:.0f} s at most; a second signal ends it at once", file=sys.stderr)
        return limit_s

    def early_end(self, at_once: bool = False) -> EarlyEnd | None:
        """The start's early end, once the last checkpoint is complete. Checks once per second, unless `at_once`."""
        if at_once or time.monotonic() >= self._next_look:
            self._end = read_early_end(self._run_dir, self._incarnation)
            self._next_look = time.monotonic() + _LOOK_EVERY_S
        return self._end if self._end is not None and self._end.saved else None
