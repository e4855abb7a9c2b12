"""torch.profiler around the trainer's steps (loading it takes seconds, which is why this is no unit test)."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from minpro_megatron.actor.profiles import Profiler
from minpro_megatron.monitor.trace import NoTracer

pytestmark = pytest.mark.e2e


def test_the_profiler_runs_in_its_steps_and_leaves_a_file(tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "rank-0.json.gz"
    profiler = Profiler(NoTracer(), range(1, 3), path)
    for step in range(4):
        profiler.step(step)
        assert path.is_file() == (step > 2)
        with profiler.span(f"phase of {step}"):
            torch.ones(3).add(1)
    profiler.close()
    names = {event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {"phase of 1", "phase of 2", "aten::add"} <= names
    assert not {"phase of 0", "phase of 3"} & names


def test_a_run_that_ends_in_a_profiled_step_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.json.gz"
    profiler = Profiler(NoTracer(), range(1), path)
    profiler.step(0)
    profiler.close()
    assert path.is_file()
