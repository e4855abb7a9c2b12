"""Selects the lines of a role's or a rollout server's log that explain why it ended."""

import re
from dataclasses import dataclass
from pathlib import Path

from minpro_megatron.terminal_text import visible

_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\s*$")
_RANK = re.compile(r"^\[rank\d+\]:\s?")  # torch's prefix of each line of a rank's traceback
_COMPLAINT = re.compile(r"\b(ERROR|CRITICAL|FATAL|[A-Z]\w*Error|[Ee]rror:|[Ss]egmentation fault)\b")
# Errors that a process reports because another process has failed: true, but not the cause.
_CONSEQUENCE = re.compile(
    r"SignalException|KeyboardInterrupt|CancelledError|BrokenPipeError|DistNetworkError"
    r"|Connection closed by peer|[Cc]onnection reset by peer|Connect call failed"
)
# torchrun's report of a failed rank: this line names the rank and its status, the others repeat it.
_TORCHRUN_VERDICT = re.compile(r"torch/distributed/elastic/.*failed \(exitcode")
_TORCHRUN_CHATTER = re.compile(r"torch/distributed/(elastic/.*(closing signal|death signal)|run\.py)|^\*{20,}$")
_WARNING = re.compile(r":\d+: \w*Warning: |^W\d{4} ")  # Python's, followed by a line of its source, and torch's
_NEW_LOG_LINE = re.compile(
    r"\[|[EWIF]\d{4} |\d{4}-\d\d-\d\d|(INFO|WARNING|ERROR|DEBUG)\b|During handling of|The above exception"
)
_TAIL_BYTES = 256 * 1024
_LINES_AFTER = 5


@dataclass(frozen=True, slots=True)
class _Traceback:
    """The lines of a traceback: heading and frames, the message, and the indices of all these lines."""

    frames: list[str]
    message: list[str]
    indices: list[int]

    @property
    def is_consequence(self) -> bool:
        return is_consequence(" ".join(self.message))


def is_consequence(message: str) -> bool:
    """Whether an error's message only reports the end of another process."""
    return _CONSEQUENCE.search(message) is not None


def explanation(log_file: Path, max_lines: int = 20, start: int = 0, role: str = "") -> list[str]:
    """About `max_lines` lines of the log. These are the reasons that `role` itself printed for its end ("serve: ...").
    Without such lines: the last traceback that is a cause and not a consequence, with the end of the log if the role
    continued after it. Otherwise the end of the log, with the last error before it. Empty if the log contains only
    warnings and consequences of another role's end. `start`: the byte offset at which this start of the role began to
    write. Control characters are escaped."""
    return list(map(visible, _explanation(log_file, max_lines, start, role)))


def _explanation(log_file: Path, max_lines: int, start: int, role: str) -> list[str]:
    lines = _without_torchrun(_tail(log_file, start))
    if role and (reasons := [line for line in lines if line.startswith(f"{role}: ")]):
        return list(dict.fromkeys(reasons))[
            :max_lines
        ]  # each line once: all ranks of a trainer may print the same reason
    tracebacks = [_traceback(lines, index) for index, line in enumerate(lines) if _TRACEBACK.search(line)]
    causes = [traceback for traceback in tracebacks if not traceback.is_consequence]
    consequences = {index for traceback in tracebacks if traceback.is_consequence for index in traceback.indices}
    if causes:
        last = causes[-1]
        after = [lines[index] for index in range(last.indices[-1] + 1, len(lines)) if index not in consequences]
        return _shortened(last, max_lines) + (["...", *after[-_LINES_AFTER:]] if after else [])
    relevant = [line for index, line in enumerate(lines) if index not in consequences and not _is_warning(lines, index)]
    return _end(relevant, max_lines)


def shortened(lines: list[str], max_lines: int = 20) -> list[str]:
    """The last traceback of a formatted exception, in about `max_lines` lines at most, with control characters
    escaped."""
    starts = [index for index, line in enumerate(lines) if _TRACEBACK.search(line)]
    shown = _shortened(_traceback(lines, starts[-1]), max_lines) if starts else lines[-max_lines:]
    return list(map(visible, shown))


def _tail(log_file: Path, start: int) -> list[str]:
    try:
        with log_file.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - _TAIL_BYTES, start))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return []
    # A progress bar rewrites its line with carriage returns: only its last state is kept.
    return [line.rstrip().split("\r")[-1] for line in text.split("\n") if line.strip()]


def _without_torchrun(lines: list[str]) -> list[str]:
    """The log up to torchrun's report of the failed rank; torchrun's own traceback after it adds nothing."""
    verdicts = [index for index, line in enumerate(lines) if _TORCHRUN_VERDICT.search(line)]
    kept = lines[: verdicts[-1] + 1] if verdicts else lines
    return [line for line in kept if not _TORCHRUN_CHATTER.search(line)]


def _traceback(lines: list[str], start: int) -> _Traceback:
    """The traceback whose heading is line `start`, without the lines of other ranks in between."""
    rank = _RANK.match(lines[start])
    prefix = rank.group(0).rstrip() if rank else ""
    frames, message, indices = [lines[start]], [], [start]
    for index, line in enumerate(lines[start + 1 :], start + 1):
        if not line.startswith(prefix):
            continue
        bare = line[len(prefix) :].removeprefix(" ") if prefix else line
        if _TRACEBACK.search(bare) or (message and _NEW_LOG_LINE.match(bare)):
            break
        (message if message or not bare.startswith(" ") else frames).append(line)
        indices.append(index)
    return _Traceback(frames, message, indices)


def _shortened(traceback: _Traceback, max_lines: int) -> list[str]:
    """The heading, as many of the innermost frames as fit, and the start of the message."""
    message = traceback.message[: max_lines // 2]
    heading, *frames = traceback.frames
    room = max_lines - len(message) - 2
    if len(frames) <= room + 1:
        return [heading, *frames, *message]
    return [heading, f"  ... {len(frames) - room} lines omitted ...", *frames[-room:], *message]


def _is_warning(lines: list[str], index: int) -> bool:
    source_line = index > 0 and lines[index].startswith("  ") and _WARNING.search(lines[index - 1])
    return bool(source_line or _WARNING.search(lines[index]))


def _end(lines: list[str], max_lines: int) -> list[str]:
    complaints = [index for index, line in enumerate(lines) if _COMPLAINT.search(line)]
    if not complaints or complaints[-1] >= len(lines) - max_lines:
        return lines[-max_lines:]
    half = max_lines // 2
    return [*lines[complaints[-1] :][:half], "...", *lines[-half:]]
