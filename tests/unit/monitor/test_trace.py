"""A run's timeline: what is recorded when, one axis for all processes, and the format of the file."""

import asyncio
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from minpro_megatron.actor.profiles import MegatronTimers, open_tracer
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.collector.collector import Collector
from minpro_megatron.collector.tracing import TracedClient, TracingObserver, collector_recorder, traced_groups
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.monitor.trace import NoTracer, Recorder, Span, TracedWatchdog, chrome_trace, write_trace
from minpro_megatron.prompts.prompts import PromptStream
from minpro_megatron.records import CollectedGroup, IssuedGroup
from minpro_megatron.serving.client import SamplingParameters
from tests.support.collector_rig import FakeTrainer
from tests.support.rollout_fakes import FakeServers, collected, issued_groups, run_config, sequence, tokenized_prompts
from tests.support.run_examples import example_config
from tests.support.trace_format import checked_events

MS = 1_000_000


def events_of(folder: Path) -> list[dict[str, Any]]:
    return checked_events(json.loads((folder / "trace.json").read_text()))


def span(
    name: str, start_ms: float, end_ms: float, process: str = "trainer rank 0", track: str = "", parallel: bool = False
) -> Span:
    return Span(process, track, parallel, name, round(start_ms * MS), round(end_ms * MS), {})


def test_phases_nest_within_their_step_and_only_the_chosen_steps_are_there(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, "trainer rank 0", range(1, 3), of_step="global step")
    for step in range(4):
        recorder.step(step)
        recorder.step(step)  # the loop's first step has begun already when the tracer is opened
        with recorder.span("train"), recorder.span(f"update {step}"):
            pass
    recorder.close()
    events = events_of(tmp_path)
    assert sorted(event["name"] for event in events) == [
        "global step 1", "global step 2", "train", "train", "update 1", "update 2",
    ]  # fmt: skip
    by_name = {event["name"]: event for event in events}
    step, update = by_name["global step 2"], by_name["update 2"]
    assert step["ts"] <= update["ts"]
    assert update["ts"] + update["dur"] <= step["ts"] + step["dur"]
    assert {event["thread"] for event in events} == {"trainer rank 0"}


def test_a_span_counts_if_any_part_of_it_lies_in_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(ms=0)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock.ms * MS)
    recorder = Recorder(tmp_path, 0, "collector", range(1, 2))
    for at, step in ((10, 0), (20, 1), (30, 2)):
        clock.ms = at
        recorder.step(step)
        for name, start, end in (("before", 11, 19), ("into", 11, 21), ("across", 5, 40), ("late", 29, 45)):
            if at <= end < at + 10 or (at == 30 and end >= 40):
                recorder.add(name, start * MS, end * MS, parallel=True)
    recorder.add("after", 31 * MS, 50 * MS, parallel=True)
    recorder.close()
    assert sorted(event["name"] for event in events_of(tmp_path)) == ["across", "into", "late"]


def test_processes_share_the_axis_of_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks for intervals start anywhere; what lies between two processes' spans is the wall clock's to say."""
    for process, wall_ms, interval_ms in (("trainer rank 0", 5000, 70), ("collector", 5040, 900_000)):
        monkeypatch.setattr(time, "time_ns", lambda ms=wall_ms: ms * MS)
        monkeypatch.setattr(time, "perf_counter_ns", lambda ms=interval_ms: ms * MS)
        recorder = Recorder(tmp_path, 0, process, range(1))
        recorder.step(0)
        recorder.add("work", (interval_ms + 1) * MS, (interval_ms + 3) * MS)
        recorder.close()
    assert {event["process"]: (event["ts"], event["dur"]) for event in events_of(tmp_path)} == {
        "trainer rank 0": (0, 2000), "collector": (40_000, 2000),
    }  # fmt: skip


def test_what_goes_on_at_once_gets_lanes_and_what_nests_gets_one() -> None:
    spans = [span(f"group {n}", n, n + 2.5, "server 0", track="generation", parallel=True) for n in range(6)]
    spans.append(span("short", 1.1, 1.2, "server 0", track="generation", parallel=True))  # within group 1, not of it
    spans += [span("step", 0, 10), span("train", 0, 4), span("update", 0, 4), span("score", 4, 10)]
    events = checked_events(chrome_trace(spans))
    lanes = {event["name"]: event["thread"] for event in events if event["process"] == "server 0"}
    assert [lanes[f"group {n}"] for n in range(6)] == [f"generation {1 + n % 3}" for n in (0, 1, 2, 3, 4, 5)]
    assert lanes["short"] == "generation 3"
    assert {event["thread"] for event in events if event["process"] != "server 0"} == {"trainer rank 0"}


def test_processes_stand_in_the_order_in_which_they_are_read() -> None:
    processes = ["server 10", "server 2", "collector", "trainer rank 11", "trainer rank 2"]
    trace = chrome_trace([span("work", 0, 1, process) for process in processes])
    ordered = [event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"]
    assert ordered == ["trainer rank 2", "trainer rank 11", "collector", "server 2", "server 10"]
    assert chrome_trace([])["traceEvents"] == []


def test_the_file_is_there_one_step_after_the_last_and_holds_all_processes(tmp_path: Path) -> None:
    ranks = [Recorder(tmp_path, 0, f"trainer rank {n}", range(1, 2), of_step="step", merges=n == 0) for n in (0, 1)]
    for step in range(4):
        assert not (tmp_path / "trace.json").exists()
        for rank in reversed(ranks):
            rank.step(step)
    assert {event["process"] for event in events_of(tmp_path)} == {"trainer rank 0", "trainer rank 1"}


def test_a_run_that_goes_on_replaces_the_trace_only_if_it_traces_something(tmp_path: Path) -> None:
    for incarnation, first in enumerate((0, 2)):
        recorder = Recorder(tmp_path, incarnation, "trainer rank 0", range(1, 3), of_step="step")
        for step in range(first, 4):
            recorder.step(step)
        recorder.close()
    assert [event["name"] for event in events_of(tmp_path)] == ["step 2"]
    Recorder(tmp_path, 2, "trainer rank 0", range(1, 3), of_step="step").close()
    assert [event["name"] for event in events_of(tmp_path)] == ["step 2"]


def test_half_a_line_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    assert write_trace(tmp_path) is None
    recorder = Recorder(tmp_path, 0, "collector", range(1), of_step="serving version")
    recorder.step(0)
    recorder.step(1)
    with (tmp_path / "trace" / "0" / "collector.jsonl").open("a") as file:
        file.write('["collector", "", fal')
    assert write_trace(tmp_path) == tmp_path / "trace.json"
    assert [event["name"] for event in events_of(tmp_path)] == ["serving version 0"]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "trace").write_text("in the way")
    recorder = Recorder(tmp_path, 0, "collector", range(1), of_step="serving version")
    recorder.step(0)
    recorder.close()
    assert "some spans of collector are missing from the trace" in caplog.text


def traced(config: RunConfig, *overrides: str) -> RunConfig:
    return with_overrides(config, ["debug.trace_steps=1:2", *overrides])


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    chunk = SimpleNamespace(config=SimpleNamespace(timers=None))
    config = run_config(tmp_path)
    tracer = open_tracer(config, 0, 0, [chunk], 0)
    assert isinstance(tracer, NoTracer)
    assert tracer.span("train") is tracer.span("score")  # made once
    assert chunk.config.timers is None
    assert collector_recorder(config, 0) is None
    other_rank = with_overrides(config, ["debug.profile_steps=1:1"])
    assert isinstance(open_tracer(other_rank, 0, 1, [chunk], 0), NoTracer)


def test_megatrons_timers_and_the_watchdogs_parts_are_spans_of_the_trainer(tmp_path: Path) -> None:
    chunk = SimpleNamespace(config=SimpleNamespace(timers=None))
    config = traced(run_config(tmp_path))
    tracer = open_tracer(config, 3, 1, [chunk], 1)
    watchdog = TracedWatchdog(tmp_path / "stacks.txt", 60, tracer)
    with tracer.span("train"), watchdog.guard("update 4"):
        chunk.config.timers("forward-compute", log_level=2).start(barrier=True)
        chunk.config.timers("forward-compute").stop()
    watchdog.close()
    tracer.close()
    assert (config.run_dir / "trace" / "3" / "trainer-rank-1.jsonl").is_file()
    by_start = sorted(events_of(config.run_dir), key=lambda event: (event["ts"], -event["dur"]))
    assert [event["name"] for event in by_start] == ["global step 1", "train", "update 4", "forward-compute"]


class Client:
    """A server's client that samples at once, and fails the first time."""

    name = "server 3"

    def __init__(self) -> None:
        self.num_calls = 0

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def policy_version(self, timeout_s: float) -> int:
        return 7

    async def generates(self, timeout_s: float) -> bool:
        return True

    async def generate(
        self, prompt_token_ids: Any, seeds: Any, sampling: Any, policy_version: int, *_: Any, **__: Any
    ) -> Any:
        self.num_calls += 1
        fails = self.num_calls == 1
        await asyncio.sleep(0)
        if fails:
            raise ConnectionError("it went away")
        return [sequence(policy_version, seed) for seed in seeds]


def test_groups_are_spans_of_their_servers_also_when_they_fail(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0, "collector", range(1))
    recorder.step(0)
    client = TracedClient(Client(), recorder, 3)

    async def at_once() -> None:
        pass

    async def collect(issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        for _ in range(2):
            try:  # in a task of its own, as a fleet's member does
                ask = client.generate(
                    issued.prompt_token_ids, issued.sampling_seeds, sampling, issued.policy_version, at_once
                )
                await asyncio.create_task(ask)
                break
            except ConnectionError:
                continue
        return collected(issued)

    async def main() -> None:
        group = traced_groups(collect, recorder)
        async with client as entered, asyncio.TaskGroup() as tasks:
            assert await entered.policy_version(1.0) == 7
            training, heldout = issued_groups([4, 5])
            for issued in (training, msgspec.structs.replace(heldout, is_evaluation=True)):
                tasks.create_task(group(issued, SamplingParameters(1.0, 6)))  # type: ignore[arg-type]

    asyncio.run(main())
    recorder.close()
    generated = [event for event in events_of(tmp_path) if event["process"] == "server 3"]
    assert sorted(event["name"] for event in generated) == ["group 4", "group 4", "held-out prompt 5"]
    assert sorted(event["args"]["tokens"] for event in generated) == [0, 6, 6]
    graded = [event["name"] for event in events_of(tmp_path) if event["process"] == "collector"]
    assert sorted(graded) == ["group 4", "held-out prompt 5"]


def test_a_collector_traces_publications_and_evaluations_and_does_the_same(tmp_path: Path) -> None:
    config = traced(run_config(tmp_path, evaluate_every=2))

    async def main(config: RunConfig, recorder: Recorder | None) -> FakeTrainer:
        servers, trainer = FakeServers(), FakeTrainer(config)
        journal = await Journal.open(config.run_dir)
        stream = PromptStream(tokenized_prompts(7), config)
        collect = servers.collect if recorder is None else traced_groups(servers.collect, recorder)
        observer = None if recorder is None else TracingObserver(recorder)
        collector = Collector(config, journal, stream, tokenized_prompts(2), collect, servers, observer=observer)
        await collector.restore(0)
        running = asyncio.create_task(collector.run())
        await trainer.run(collector)
        await collector.totals_delivered()
        await running
        await journal.close()
        return trainer

    recorder = collector_recorder(config, 0)
    assert recorder is not None
    trainers = [
        asyncio.run(main(config, recorder)),
        asyncio.run(main(with_overrides(config, ["name=plain"]), None)),
    ]
    recorder.close()
    consumed = [{k: [g.issued.group_id for g in b.groups] for k, b in trainer.trained.items()} for trainer in trainers]
    assert consumed[0] == consumed[1]
    events = events_of(config.run_dir)
    names = {event["thread"].rstrip(" 12"): set() for event in events}
    for event in events:
        names[event["thread"].rstrip(" 12")].add(event["name"])
    assert names["collector"] == {"serving version 1", "serving version 2"}
    assert {"publish version 2", "publish version 3"} <= names["publication"]
    assert names["evaluation"] == {"evaluate version 2"}


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("debug.trace_steps=3", "debug.trace_steps: String should match pattern"),
        (
            "debug.trace_steps=3:1",
            r"debug.trace_steps: the first global step must not be after the last.* \(got '3:1'\)",
        ),
        ("debug.trace_steps=1:4", "debug.trace_steps = 1:4: the run has global steps 0 to 3"),
        ("debug.profile_steps=4:4", "debug.profile_steps = 4:4: the run has global steps 0 to 3"),
        ("debug.profile_ranks=[-1]", "debug.profile_ranks.0: Input should be greater than or equal to 0"),
    ],
)
def test_steps_and_ranks_that_are_not_there_are_refused(tmp_path: Path, override: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        with_overrides(example_config(tmp_path), [override])


def test_a_rank_beyond_the_mesh_is_refused_where_it_is_used(tmp_path: Path) -> None:
    config = with_overrides(example_config(tmp_path), ["debug.profile_ranks=[0,1]"])
    with pytest.raises(ValueError, match="the mesh has ranks 0 to 0, but not 1"):
        with_overrides(config, ["debug.profile_steps=0:1"])
    assert with_overrides(config, ["debug.trace_steps=0:3"]).debug.traced == range(4)


def test_a_timer_can_be_stopped_twice() -> None:
    timers = MegatronTimers(NoTracer())
    timers("forward-recv").start()
    timers("forward-recv").stop()
    timers("forward-recv").stop()
