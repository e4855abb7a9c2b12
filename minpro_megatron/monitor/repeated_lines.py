"""Limits repeated log messages, so that a fault that external requests can cause does not fill the disk."""

import logging
import time

INTERVAL_S = 60.0
MAX_KINDS = 1000  # number of different messages that are remembered


class RepeatedLines(logging.Filter):
    """Passes each message format once per INTERVAL_S seconds, with the number of suppressed messages since then."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[
            str, tuple[float, int]
        ] = {}  # by message format: time of the last one, and the number suppressed since

    def filter(self, record: logging.LogRecord) -> bool:
        wording = str(record.msg).partition("\n")[0]
        now = time.monotonic()
        shown_at, suppressed = self._shown.get(wording, (-float("inf"), 0))
        if now - shown_at < INTERVAL_S:
            self._shown[wording] = (shown_at, suppressed + 1)
            return False
        if len(self._shown) >= MAX_KINDS:
            self._shown.clear()
        self._shown[wording] = (now, 0)
        if suppressed:
            record.msg = f"({suppressed} more of these since the last one) {record.msg}"
        return True


def limit_repeated_lines(*loggers: str) -> None:
    """Limits each message of these loggers to one per INTERVAL_S seconds."""
    for name in loggers:
        logging.getLogger(name).addFilter(RepeatedLines())
