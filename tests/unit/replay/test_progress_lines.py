"""A replay whose output is a file or a pipe: what it does, how fast, and how long it will take."""

from minpro_megatron.replay.job import ReplayProgress
from minpro_megatron.replay.progress_lines import ProgressLines


def test_lines_have_the_phase_at_once_and_then_the_rate_and_the_time_left() -> None:
    said: list[str] = []
    lines = ProgressLines(said.append)
    lines.show(ReplayProgress("loading the model"), 100.0)
    assert said == ["loading the model"]
    for second, phase, done in (
        (101, "per-token values", 0),  # too soon for another line
        (103, "update 1/3", 1_000),
        (110, "update 2/3", 4_500),  # the same kind of work
        (118, "update 2/3", 4_500),
        (126, "update 2/3", 4_500),
        (134, "update 2/3", 4_500),
    ):
        lines.show(ReplayProgress(phase, done, 12_000), float(second))
    assert said[1:] == [
        "update 1/3: 1,000 of 12,000 tokens, 500/s, 22 s left",
        "update 2/3: 4,500 of 12,000 tokens, 500/s, 7 s left",
        "update 2/3: 4,500 of 12,000 tokens, 500/s, 0 s left",
    ]
