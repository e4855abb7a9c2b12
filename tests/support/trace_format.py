"""What ui.perfetto.dev and chrome://tracing need of a trace file, checked event by event."""

from collections import defaultdict
from typing import Any


def checked_events(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The trace's complete events, each with the names of its process and thread as `process` and `thread`. Raises
    AssertionError if the trace is not in Chrome's Trace Event Format, or events of a thread overlap without nesting."""
    names: dict[str, dict[tuple[int, int], str]] = {"process_name": {}, "thread_name": {}}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("M", "X"), event
        assert type(event["pid"]) is int, event
        assert type(event["tid"]) is int, event
        if event["ph"] == "M" and event["name"] in names:
            names[event["name"]][event["pid"], event["tid"]] = event["args"]["name"]
    processes = {pid: name for (pid, _), name in names["process_name"].items()}
    assert len(set(processes.values())) == len(processes), "two processes of one name"
    threads: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            assert event["name"]
            assert event["ts"] >= 0, event
            assert event["dur"] >= 0, event
            assert isinstance(event["args"], dict)
            threads[event["pid"], event["tid"]].append(event)
    found = []
    for place, events in threads.items():
        _check_nesting(events)
        found += [event | {"process": processes[place[0]], "thread": names["thread_name"][place]} for event in events]
    assert not found or min(event["ts"] for event in found) == 0
    return found


def _check_nesting(events: list[dict[str, Any]]) -> None:
    open_events: list[dict[str, Any]] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while open_events and open_events[-1]["ts"] + open_events[-1]["dur"] <= event["ts"] + 0.001:
            open_events.pop()
        if open_events:
            around = open_events[-1]
            ends = event["ts"] + event["dur"], around["ts"] + around["dur"]
            assert ends[0] <= ends[1] + 0.001, f"{event['name']} overlaps {around['name']}"
        open_events.append(event)
