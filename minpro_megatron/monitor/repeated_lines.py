"""A fault that others cause again and again must not fill the disk with its log."""

import logging
import time

INTERVAL_S = 60.0
MAX_KINDS = 1000  # that are remembered


class RepeatedLines(logging.Filter):
    """Lets a message of one wording through once in INTERVAL_S seconds, with the number of those left out since."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, tuple[float, int]] = {}  # by wording: when, and how many were left out since

    def filter(self, record: logging.LogRecord) -> bool:
        wording = str(record.msg).partition("\n")[0]
        now = time.monotonic()
        shown_at, left_out = self._shown.get(wording, (-float("inf"), 0))
        if now - shown_at < INTERVAL_S:
            self._shown[wording] = (shown_at, left_out + 1)
            return False
        if len(self._shown) >= MAX_KINDS:
            self._shown.clear()
        self._shown[wording] = (now, 0)
        if left_out:
            record.msg = f"({left_out} more of these since the last one) {record.msg}"
        return True


def limit_repeated_lines(*loggers: str) -> None:
    """What these loggers say again and again is logged once in INTERVAL_S seconds."""
    for name in loggers:
        logging.getLogger(name).addFilter(RepeatedLines())
