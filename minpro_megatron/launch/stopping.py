"""How a start of a run ends before the run does: by its time limit, or because of a signal."""

import sys
import time
from collections.abc import Mapping

from minpro_megatron.config.run import RunConfig
from minpro_megatron.run_folder.early_end import EarlyEnd, StopRequest, read_early_end, request_stop

# From the trainer's last checkpoint to the end of all processes.
ENDING_S = 15.0
# Slurm gives the processes this much less than slurm.end_early_s to save after its SIGTERM.
SIGTERM_RESERVE_S = 60.0
# A last checkpoint under way is finished, whatever checkpoint.save_on_stop_s says.
LAST_SAVE_LIMIT_S = 600.0
_LOOK_EVERY_S = 1.0  # the run folder may be on a shared file system


def save_by(config: RunConfig, environment: Mapping[str, str], began: float, end_early_s: float = 0.0) -> float | None:
    """Unix time by which the start that began at `began` must have saved; None if it has no time limit.

    The job's end is Slurm's SLURM_JOB_END_TIME; `end_early_s` before it all processes get SIGTERM.
    """
    limits = []
    if config.checkpoint.time_limit_minutes:
        limits.append(began + 60 * config.checkpoint.time_limit_minutes)
    job_end = environment.get("SLURM_JOB_END_TIME", "")
    if job_end.isdecimal() and int(job_end) > 0:
        limits.append(int(job_end) - end_early_s)
    return min(limits) - ENDING_S if limits else None


class Stopping:
    """Watches one start for its early end, and asks the trainer for one when this process gets a signal to stop."""

    def __init__(self, config: RunConfig, incarnation: int, end_early_s: float = 0.0) -> None:
        """`end_early_s`: SIGTERM comes so long before the job's end, so that the trainer may use most of it."""
        self._run_dir, self._incarnation = config.run_dir, incarnation
        settings = config.checkpoint
        saves = settings.saves_before_end and config.debug.trainer == "megatron"
        self._allowed_s = max(settings.save_on_stop_s, end_early_s - SIGTERM_RESERVE_S, 0.0) if saves else 0.0
        self._next_look = 0.0
        self._end: EarlyEnd | None = None

    def allowed_s(self, signal_name: str) -> float:
        """How long the roles may go on after the signal, so that the trainer can save. Tells it to."""
        end = read_early_end(self._run_dir, self._incarnation)
        if end is None and self._allowed_s:
            request_stop(self._run_dir, self._incarnation, StopRequest(reason=f"told to stop by {signal_name}"))
            what = "the trainer finishes its global step and saves"
        elif end is not None and not end.saved:
            what = f"the last checkpoint, after global step {end.policy_version}, is being saved"
        else:
            return 0.0
        limit_s = max(self._allowed_s, LAST_SAVE_LIMIT_S if end else 0.0)
        print(f"{signal_name}: {what}, for {limit_s:.0f} s at most; a second signal ends it at once", file=sys.stderr)
        return limit_s

    def early_end(self, at_once: bool = False) -> EarlyEnd | None:
        """The start's early end, once the last checkpoint is complete. Looks once a second, unless `at_once`."""
        if at_once or time.monotonic() >= self._next_look:
            self._end = read_early_end(self._run_dir, self._incarnation)
            self._next_look = time.monotonic() + _LOOK_EVERY_S
        return self._end if self._end is not None and self._end.saved else None
