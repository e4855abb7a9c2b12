"""Counts the responses without a reward, and logs the first of them in full."""

import logging

log = logging.getLogger(__name__)

# The number of failures that are logged individually; later ones are only counted.
MAX_LOGGED_FAILURES = 5


class FailureCounts:
    """`num_failed` counts responses without a reward because their grader raised, returned no finite number, died or
    could not be reached; `num_timed_out` counts those whose grader exceeded its time."""

    def __init__(self) -> None:
        self.num_failed = 0
        self.num_timed_out = 0

    def count(self, problem: str, timed_out: bool, text: str, answer: str) -> None:
        """Counts the response `text`, which has no reward because of `problem`."""
        if timed_out:
            self.num_timed_out += 1
        else:
            self.num_failed += 1
        total = self.num_failed + self.num_timed_out
        if total <= MAX_LOGGED_FAILURES:
            log.warning("no reward for %r against %r: %s", text[-200:], answer[:200], problem)
        elif total.bit_count() == 1:  # 8, 16, 32, ...
            log.warning(
                "no reward for %d responses since the start: grader failed for %d, exceeded its time for %d; the last "
                "one: %s", total, self.num_failed, self.num_timed_out, problem,
            )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """The counts, under the names that metrics.metric declares."""
        return {
            "reward/grader_failed": float(self.num_failed),
            "reward/grader_timed_out": float(self.num_timed_out),
        }
