"""What the timeline of a real run must show of it."""

import json
from pathlib import Path

from tests.support.trace_format import checked_events


def check_trace(run_dir: Path, num_ranks: int, steps: range, groups_of_a_step: int) -> None:
    """trace.json of a run in delay mode with trace_steps = `steps`: every role, on one axis, in the right order."""
    events = checked_events(json.loads((run_dir / "trace.json").read_text()))
    ends = {(event["process"], event["name"]): event["ts"] + event["dur"] for event in events}
    starts = {(event["process"], event["name"]): event["ts"] for event in events}
    for rank in range(num_ranks):
        own = [event for event in events if event["process"] == f"trainer rank {rank}"]
        names = {event["name"] for event in own}
        assert {f"global step {step}" for step in steps} == {name for name in names if name.startswith("global step")}
        assert {"wait_for_batch", "score", "train", "publish", "checkpoint"} <= names
        assert {"forward-compute", "backward-compute", "forward-backward", "all-grads-sync"} <= names
        for step in steps:  # all ranks are in a step at the same time
            process = f"trainer rank {rank}", f"global step {step}"
            assert starts[process] < ends["trainer rank 0", f"global step {step}"]
            updates = [event for event in own if event["name"].endswith(f"(global step {step})")]
            assert starts[process] <= min(event["ts"] for event in updates if event["name"].startswith("update"))
            assert max(event["ts"] + event["dur"] for event in updates) <= ends[process]
    generated = [event for event in events if event["process"] == "server 0"]
    trained = [event for event in generated if event["name"].startswith("group")]
    assert all(event["args"]["tokens"] > 0 for event in generated)
    assert len([event for event in trained if event["args"]["version"] == steps[0]]) == groups_of_a_step
    for step in steps[1:]:
        # the servers got the weights of a step after the trainer's updates of the step before, and sampled only then
        publication = f"publish version {step}"
        in_step = [event for event in trained if event["args"]["version"] == step]
        assert len(in_step) in (0, groups_of_a_step)
        assert all(event["ts"] >= starts["collector", publication] for event in in_step)
        assert starts["collector", f"serving version {step}"] >= ends["collector", publication] - 0.001
        assert starts["trainer rank 0", f"global step {step - 1}"] < starts["collector", publication]
        assert starts["collector", publication] < ends["trainer rank 0", f"global step {step - 1}"]
