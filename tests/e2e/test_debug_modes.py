"""Parts of the system alone, with real processes and the reference engine: training on a journal, and a timer."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.buffer.journal_reader import JournalReader
from minpro_megatron.monitor.summary import RunSummary
from tests.e2e.conftest import ROOT, SMALL_RUN, Launcher

pytestmark = pytest.mark.e2e

SMALL = (*SMALL_RUN, "num_global_steps=3")
# What follows from the weights, the batches and the scores, and from no clock.
COMPUTED = ("objective/", "optimizer/", "ratio/", "prefix_min/", "policy/", "reward/", "staleness/", "mismatch/")
# counts of the collector, which has no part in training on a journal
GRADING = ("reward/grader_failed", "reward/grader_timed_out", "reward/attempts_failed", "reward/groups_not_graded")


def computed(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of each global step that must be the same whenever it is computed."""
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [entry["metrics"] for entry in entries if "objective/loss" in entry["metrics"]]
    return [
        {name: value for name, value in metrics.items() if name.startswith(COMPUTED) and name not in GRADING}
        for metrics in steps
    ]


def summary_of(run_dir: Path) -> RunSummary:
    return RunSummary.model_validate_json((run_dir / "summary.json").read_text())


@pytest.mark.long
def test_training_on_a_journal_repeats_the_run_that_wrote_it(launches: Launcher) -> None:
    whole = launches("whole", *SMALL)
    status, output = whole.wait(100)
    assert status == 0, output
    before = (whole.run_dir / "journal.sqlite").read_bytes()

    alone = launches("alone", *SMALL, f"debug.journal={whole.run_dir}")
    status, output = alone.wait(100)
    assert status == 0, output
    assert sorted(path.name for path in (alone.run_dir / "logs").glob("*.log")) == ["train.log"]
    assert "pass@1" not in output
    assert len(computed(whole.run_dir)) == 3
    assert computed(alone.run_dir) == computed(whole.run_dir)  # bit by bit: the same groups, scores and order
    weights = [(launch.run_dir / "hf_export" / "model.safetensors").read_bytes() for launch in (whole, alone)]
    assert weights[0] == weights[1]
    summary = summary_of(alone.run_dir)
    assert (summary.updates, summary.groups_consumed, summary.versions_published) == (6, 12, 0)
    assert (summary.pass_at_1_before, summary.servers) == (None, None)
    assert (alone.run_dir / "report.html").stat().st_size > 10_000
    assert (whole.run_dir / "journal.sqlite").read_bytes() == before

    other = launches("other", *SMALL, f"debug.journal={whole.run_dir}", "num_global_steps=4")
    status, output = other.wait(60)
    assert status == 2
    assert f"error: debug.journal = {whole.run_dir}: global steps 3 of num_global_steps = 4 are not in it" in output

    shown = subprocess.run(
        [sys.executable, "tools/show_rollouts.py", whole.run_dir, "--group", "0"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip
    assert "group 0, consumed, prompt calculator-" in shown
    assert "=\n" in shown  # the prompt as text, by the model's tokenizer


@pytest.mark.long
def test_a_timer_measures_servers_that_change_versions_under_way(launches: Launcher) -> None:
    bounded = ("staleness.mode=bounded", "staleness.max_staleness=2", "num_global_steps=6", "server.count=2")
    timed = launches("timed", *SMALL, *bounded, "debug.trainer=timer", "debug.timer_step_s=0.1")
    status, output = timed.wait(100)
    assert status == 0, output
    assert "tokens/s together (2 of them)" in output
    summary = summary_of(timed.run_dir)
    assert (summary.steps, summary.updates, summary.versions_published, summary.hf_export) == (6, 0, 6, None)
    assert summary.largest_staleness <= 2
    assert summary.wall_time_by_phase_s["train"] >= 0.6
    use = summary.servers
    assert use is not None
    assert use.num_servers == 2
    assert use.idle_share is not None
    assert len(use.batch_seconds) == 6
    with JournalReader(timed.run_dir) as reader:
        responses = [response for group in reader.groups("state = 'consumed'") for response in group.responses]
    assert use.num_tokens >= sum(response.num_tokens for response in responses) > 0
    versions = [response.policy_versions for response in responses if response.policy_versions is not None]
    assert 0 < np.concatenate(versions).max() <= 6
    assert all(response.trained_log_probs is None for response in responses)
    assert not (timed.run_dir / "hf_export").exists()
