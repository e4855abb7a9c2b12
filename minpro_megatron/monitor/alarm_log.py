"""Writes a run's alarms to its log, and one JSON line each to `run_dir/alarms.jsonl`."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from minpro_megatron.config.alarms import AlarmName
from minpro_megatron.config.run import RunConfig
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.monitor.alarms import CHECKS, Alarm, AlarmWatch, Limits, describe_failed_evaluations
from minpro_megatron.monitor.history import LineTail, read_history

FILE_NAME = "alarms.jsonl"

log = logging.getLogger(__name__)


class AlarmLog:
    """A run's alarms; rank 0 of the trainer holds one."""

    def __init__(self, config: RunConfig, first_step: int) -> None:
        """A run that resumes at `first_step` knows from its metrics which alarms were raised before. Alarms that an
        interrupted incarnation raised from this step on are removed from the file, because the steps are trained
        again."""
        bounded = config.staleness.mode == "bounded"
        limits = Limits(config.alarms, config.staleness.max_staleness if bounded else None)
        self._path = config.run_dir / FILE_NAME
        self._watch = AlarmWatch(limits)
        for entry in read_history(config.run_dir):
            if entry.is_global_step and entry.step < first_step:
                self._watch.add(entry.step, entry.metrics)
        if self._path.exists():
            lines = LineTail(self._path).new_lines()
            kept = [line for line in lines if (found := decode_alarm(line)) and found[0].step < first_step]
            replace_file(self._path, "".join(f"{line}\n" for line in kept))

    def step(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that the metrics of global step `step` raise, written and logged."""
        return self._raise_all(self._watch.add(step, metrics))

    def published(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that the metrics of the publication after global step `step`, the last one, raise."""
        return self._raise_all(self._watch.complete(step, metrics))

    def failed_at_end(self, last_step: int, num_evaluations: int) -> None:
        """Raises the alarm for `num_evaluations` that failed after the last step, whose metrics do not count them."""
        name: AlarmName = "failed_evaluation"
        self._raise(Alarm(last_step, name, describe_failed_evaluations(num_evaluations), CHECKS[name].remedy))

    def _raise_all(self, alarms: list[Alarm]) -> list[Alarm]:
        for alarm in alarms:
            self._raise(alarm)
        return alarms

    def _raise(self, alarm: Alarm) -> None:
        log.warning("alarm: %s", alarm)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(alarm) | {"time": time.time()}) + "\n")

    def counts(self) -> dict[str, float]:
        """The number of alarms since the run's start, as metrics."""
        of_kinds = self._watch.num_raised
        by_kind = {f"alarms/raised_by_kind/{name}": float(count) for name, count in of_kinds.items()}
        return {"alarms/raised": float(sum(of_kinds.values()))} | by_kind


def decode_alarm(line: str | bytes) -> tuple[Alarm, float] | None:
    """The alarm in a line of alarms.jsonl and the Unix time, in seconds, at which it was raised; None for
    any other line."""
    try:
        content = json.loads(line)
        if content["name"] not in CHECKS:
            return None
        alarm = Alarm(int(content["step"]), content["name"], str(content["seen"]), str(content["remedy"]))
        return alarm, float(content["time"])
    except (ValueError, KeyError, TypeError):
        return None


def read_alarms(run_dir: Path) -> list[Alarm]:
    """The run's alarms in the order in which they were raised."""
    found = [decode_alarm(line) for line in LineTail(Path(run_dir) / FILE_NAME).new_lines()]
    return [alarm for alarm, _ in filter(None, found)]
