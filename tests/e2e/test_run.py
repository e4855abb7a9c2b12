"""The main job with every real part: three roles, two Megatron ranks, a real SGLang server."""

import json
import math
import signal
import sqlite3
import time
from collections.abc import Collection
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minpro_megatron.buffer.journal_reader import JournalReader, StoredGroup
from minpro_megatron.metrics.declared import METRICS
from minpro_megatron.monitor.tensorboard_board import board_folder
from tests.e2e.conftest import ROOT, SMALL_RUN, Launch, Launcher
from tests.e2e.engine_mismatch import responses_that_differ
from tests.e2e.recomputed import (
    UNSOURCED,
    is_in_the_same_bin,
    recomputed,
    recomputed_evaluation,
    recomputed_quantiles,
    recomputed_rates,
    recomputed_totals,
)
from tests.e2e.trace_check import check_trace

pytestmark = pytest.mark.e2e

SMALL = (
    "num_global_steps=4",
    "evaluation.num_prompts=8",
    "evaluation.samples_per_prompt=2",
    "batch.num_prompts=8",
    "batch.mini_batch_prompts=2",
)
# Random weights have no right answers: with this reward there is something to learn, and ratios leave 1.
LEARNING = (
    "reward.function=tests.e2e.digits_reward:grade",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_global_steps=0",
)
TRACED = range(1, 3)  # global steps
STOPPED_WITHIN_S = 50  # of wall time: a busy machine needs more than the few seconds it takes otherwise
# Nothing fails in this run, no alarm is raised, no benchmark is evaluated, no correction, no environment, no top_k and
# no factor of the learning rate is set, the servers have memory of their own, and there is no GPU.
WHERE_IT_HAPPENS = (
    "fleet/failures/", "fleet/invalid_answers/", "evaluation/", "alarms/raised_by_kind/", "memory/gpu_",
    "throughput/mfu", "corrections/", "episode/", "optimizer/learning_rate_factor", "support/", "time/turn_s",
)  # fmt: skip
HISTOGRAMS = {"ratio/log", "prefix_min/log", "prefix_ratio/gap", "response/length", "staleness/token"}


def test_run_trains_publishes_and_leaves_its_results(launches: Launcher) -> None:
    launch = launches("whole", *SMALL, *LEARNING, f"debug.trace_steps={TRACED[0]}:{TRACED[-1]}")
    status, output = launch.wait(170)
    assert status == 0, output

    summary = json.loads((launch.run_dir / "summary.json").read_text())
    expected = {"steps": 4, "updates": 16, "versions_published": 4, "smallest_staleness": 0, "largest_staleness": 2}
    expected |= {"groups_issued": 32, "groups_consumed": 32, "groups_dropped": 0, "num_evaluation_samples": 16}
    assert {name: summary[name] for name in expected} == expected
    assert summary["pass_at_1_before"] is not None
    assert summary["pass_at_1_after"] is not None

    steps = [json.loads(line) for line in (launch.run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line["metrics"] for line in steps if "objective/loss" in line["metrics"]]
    assert [metrics["staleness/max"] for metrics in trained] == [0, 1, 2, 2]
    # Server and trainer compute the same log-probs from the same version of the weights: publishing worked.
    assert responses_that_differ(launch.run_dir) <= 1
    assert max(metrics["mismatch/log_prob_abs_mean"] for metrics in trained) < 1e-4
    # later updates of step 0 have moved away from the sampling weights, by more than rounding
    assert trained[0]["ratio/max"] > 1.01
    assert all(metrics["objective/loss"] for metrics in trained)

    events = EventAccumulator(str(board_folder(launch.run_dir)), size_guidance={"histograms": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    absent = {name for name in METRICS if not any(_is_of(scalar, name) for scalar in scalars)}
    assert sorted(name for name in absent if not name.startswith(WHERE_IT_HAPPENS)) == []
    assert scalars == {name for line in steps for name in line["metrics"]}
    assert [metrics["alarms/raised"] for metrics in trained] == [0] * 4
    assert set(events.Tags()["histograms"]) == HISTOGRAMS
    _check_metrics(launch, trained, num_ranks=2)
    _check_journal(launch)
    _check_export(launch)
    check_trace(launch.run_dir, num_ranks=2, steps=TRACED, groups_of_a_step=8)
    report = (launch.run_dir / "report.html").read_text()
    assert report.count("<svg") >= 20
    assert report.count('class="t ') > 8  # tokens of the samples, colored by ratio
    assert json.loads((launch.run_dir / "environment.json").read_text())["megatron-core"] in report


def _is_of(scalar: str, declared: str) -> bool:
    family, is_family, _ = declared.partition("<")
    return scalar.startswith(family) if is_family else scalar == declared


@pytest.mark.long
def test_metrics_of_two_data_parallel_ranks_are_those_of_all_tokens(launches: Launcher, tmp_path: Path) -> None:
    """Every rank sees half of the responses, in several rows. Every other prompt has a prefix."""
    rows = [json.loads(line) for line in (ROOT / "recipes" / "data" / "calculator_train.jsonl").open()][:40]
    prefixed = {row["id"] for row in rows[::2]}
    rows = [row | ({"prefix": row["answer"][:1]} if row["id"] in prefixed else {}) for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = (*SMALL_RUN, "num_global_steps=4", f"data.train_file={tmp_path / 'train.jsonl'}")
    launch = launches("halves", *small, *LEARNING, "parallel.data=2", "batch.max_tokens_per_row=64")
    status, output = launch.wait(170)
    assert status == 0, output
    steps = [json.loads(line)["metrics"] for line in (launch.run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [metrics for metrics in steps if "objective/loss" in metrics]
    assert any(metrics["ratio/max"] > 1.01 for metrics in trained)
    assert any("reward/accuracy_by_prompt/prefixed" in metrics for metrics in trained)
    _check_metrics(launch, trained, num_ranks=2, prefixed=prefixed)


def _check_metrics(
    launch: Launch, trained: list[dict[str, float]], num_ranks: int, prefixed: Collection[str] = ()
) -> None:
    """Metrics and events are what follows from the journal's tokens; nothing is left out or made up."""
    with JournalReader(launch.run_dir) as journal:
        groups, evaluations = list(journal.groups()), journal.evaluations()
    stored = [[group for group in groups if group.consumed_step == step] for step in range(len(trained))]
    events = EventAccumulator(str(board_folder(launch.run_dir)), size_guidance={"histograms": 0}).Reload()
    written = {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}
    for step, consumed in enumerate(stored):
        expected = recomputed(consumed, step, prefixed) | recomputed_rates(consumed, trained[step], num_ranks)
        expected |= recomputed_totals(groups, evaluations, step)
        quantiles = recomputed_quantiles(consumed, step)
        told = {name for name in trained[step] if not name.startswith(UNSOURCED)}
        assert told == expected.keys() | quantiles.keys()
        for name, value in expected.items():
            assert trained[step][name] == pytest.approx(value, rel=1e-9, abs=1e-12), (step, name)
            assert written[name][step] == pytest.approx(value, rel=1e-6, abs=1e-12), (step, name)  # as float32
        for name, (value, is_exp) in quantiles.items():
            found = trained[step][name]
            assert is_in_the_same_bin(math.log(found) if is_exp else found, value), (step, name)
    for result in evaluations:
        for name, value in recomputed_evaluation(result).items():
            assert written[name][result.policy_version] == pytest.approx(value, rel=1e-6), name
    num_evaluated = sum(name.startswith("eval/") for name in written)
    assert num_evaluated == len(recomputed_evaluation(evaluations[0]))
    _check_histograms(stored[0], events)


def _check_histograms(groups: list[StoredGroup], events: EventAccumulator) -> None:
    """Those of step 0 hold every one of its tokens, or responses."""
    responses = [response for group in groups for response in group.responses]
    num_tokens = sum(response.num_tokens for response in responses)
    for name in HISTOGRAMS:
        (histogram,) = (event.histogram_value for event in events.Histograms(name))
        assert sum(histogram.bucket) == histogram.num == (len(responses) if name == "response/length" else num_tokens)


def _check_journal(launch: Launch) -> None:
    with sqlite3.connect(f"file:{launch.run_dir / 'journal.sqlite'}?mode=ro", uri=True) as journal:
        rows = journal.execute("SELECT batch_index, issued_version, state FROM groups").fetchall()
    assert sorted(rows) == [(batch, max(0, batch - 2), "consumed") for batch in range(4) for _ in range(8)]


def _check_export(launch: Launch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(launch.run_dir / "hf_export")
    tokenizer = AutoTokenizer.from_pretrained(launch.run_dir / "hf_export")
    ids = tokenizer("1+1=", return_tensors="pt", add_special_tokens=False).input_ids
    assert model(ids).logits.isfinite().all()


@pytest.mark.long
def test_killed_trainer_rank_stops_every_role(launches: Launcher) -> None:
    launch = launches("killed", *SMALL, "num_global_steps=1000")
    launch.wait_for("metrics.jsonl", 170)
    started = launch.descendants()
    torchrun = next(process for process in launch.processes("torch.distributed.run"))
    ranks = [process for process in torchrun.children() if "train" in process.cmdline()]
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    status, output = launch.wait(60)
    assert time.monotonic() - killed_at < STOPPED_WITHIN_S
    assert status == 1
    assert "train" in output
    assert _alive(started) == []


@pytest.mark.long
def test_interrupt_while_the_server_starts_leaves_no_process(launches: Launcher) -> None:
    launch = launches("interrupted", *SMALL)
    launch.wait_for("logs/server-0.log", 60)
    started = launch.descendants()
    launch.process.send_signal(signal.SIGINT)
    interrupted_at = time.monotonic()
    status, output = launch.wait(60)
    assert time.monotonic() - interrupted_at < STOPPED_WITHIN_S
    assert status == 130, output
    assert _alive(started) == []


def _alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
