"""Picks from a role's log the lines that explain why it ended."""

import re
from dataclasses import dataclass
from pathlib import Path

_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\s*$")
_RANK = re.compile(r"^\[rank\d+\]:\s?")  # torch puts it before each line of a rank's traceback
_COMPLAINT = re.compile(r"\b(ERROR|CRITICAL|FATAL|[A-Z]\w*Error|[Ee]rror:|[Ss]egmentation fault|Killed)\b")
# These are what a process says when another one has already failed: true, but not the cause.
_CONSEQUENCE = re.compile(
    r"ChildFailedError|SignalException|KeyboardInterrupt|CancelledError|BrokenPipeError|DistNetworkError"
    r"|Connection closed by peer|[Cc]onnection reset by peer|Connect call failed"
)
_NEW_LOG_LINE = re.compile(
    r"\[|[EWIF]\d{4} |\d{4}-\d\d-\d\d|(INFO|WARNING|ERROR|DEBUG)\b|During handling of|The above exception"
)
_TAIL_BYTES = 256 * 1024
_LINES_AFTER = 5


@dataclass(frozen=True, slots=True)
class _Traceback:
    """A traceback's lines: the frames with their heading, the message, and the index of the line after it."""

    frames: list[str]
    message: list[str]
    end: int

    @property
    def is_consequence(self) -> bool:
        return _CONSEQUENCE.search(" ".join(self.message)) is not None


def explanation(log_file: Path, max_lines: int = 20) -> list[str]:
    """About `max_lines` lines of the log: the last traceback that is a cause and not a consequence; else the
    lines from the last error on; else the last lines."""
    lines = _tail(log_file)
    tracebacks = [_traceback(lines, index) for index, line in enumerate(lines) if _TRACEBACK.search(line)]
    causes = [traceback for traceback in tracebacks if not traceback.is_consequence]
    if causes:
        after = lines[causes[-1].end :]
        handled = bool(after) and not any(_CONSEQUENCE.search(line) for line in after)
        # A traceback that the process outlived may not be why it ended: show the end of the log as well.
        return _shortened(causes[-1], max_lines) + (["...", *after[-_LINES_AFTER:]] if handled else [])
    if tracebacks:
        return tracebacks[-1].message[-max_lines:]  # torchrun names the rank that failed first at the end
    complaints = [index for index, line in enumerate(lines) if _COMPLAINT.search(line)]
    start = max(len(lines) - max_lines, 0)
    if complaints:
        start = min(start, max(complaints[-1] - 2, 0))
    return lines[start:][:max_lines]


def _tail(log_file: Path) -> list[str]:
    try:
        with log_file.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - _TAIL_BYTES, 0))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    # A progress bar rewrites its line with carriage returns: only its last state is worth showing.
    return [line.rstrip().split("\r")[-1] for line in text.split("\n") if line.strip()]


def _traceback(lines: list[str], start: int) -> _Traceback:
    """The traceback whose heading is line `start`, without the lines of other ranks in between."""
    rank = _RANK.match(lines[start])
    prefix = rank.group(0).rstrip() if rank else ""
    frames, message, end = [lines[start]], [], start + 1
    for index, line in enumerate(lines[start + 1 :], start + 1):
        if not line.startswith(prefix):
            continue
        bare = line[len(prefix) :].removeprefix(" ") if prefix else line
        if _TRACEBACK.search(bare) or (message and _NEW_LOG_LINE.match(bare)):
            break
        (message if message or not bare.startswith(" ") else frames).append(line)
        end = index + 1
    return _Traceback(frames, message, end)


def _shortened(traceback: _Traceback, max_lines: int) -> list[str]:
    """The heading, as many of the innermost frames as fit, and the start of the message."""
    message = traceback.message[: max_lines // 2]
    heading, *frames = traceback.frames
    room = max_lines - len(message) - 2
    if len(frames) <= room + 1:
        return [heading, *frames, *message]
    return [heading, f"  ... {len(frames) - room} lines left out ...", *frames[-room:], *message]
