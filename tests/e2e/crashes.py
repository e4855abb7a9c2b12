"""Runs of the whole system that are crashed at exact points, and what is compared of them.

The servers are the reference engine's: the same seed and weights give the same tokens, so in delay mode a run that was
crashed and went on must equal one that was not, bit for bit.
"""

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import psutil

from minpro_megatron.monitor.history import read_history
from tests.e2e.conftest import ROOT, TinyModel
from tests.e2e.episode_environment import CHAT_TEMPLATE

STEPS, PROMPTS, RESPONSES, DELAY, EVERY = 6, 4, 8, 2, 2
POINTS = Path(__file__).with_name("crash_points")
# What a metric tells of the computation and not of the clock.
COMPUTED = ("batch/", "eval/", "mismatch/", "objective/", "optimizer/", "policy/", "prefix_min/", "ratio/", "response/",
            "reward/", "staleness/")  # fmt: skip
SUMMARY = ("steps", "updates", "versions_published", "groups_issued", "groups_consumed", "groups_dropped",
           "smallest_staleness", "largest_staleness", "pass_at_1_before", "pass_at_1_after")  # fmt: skip
NO_PROCESS_WITHIN_S = 20.0

Moment = Literal["before", "after"]
# train: its torchrun; server: one rollout server; parent: the rank of a forked writer
Victim = Literal["self", "parent", "launcher", "serve", "collect", "train", "server"]


@dataclass(frozen=True)
class CrashPoint:
    """A call of the function `at` ("module:name") in a process of the run, and what happens there.

    Calls count from the start of the process, or from the call `within_call` of the function `within`.
    """

    process: Literal["train", "collect", "serve", "server"]
    at: str
    call: int = 1
    moment: Moment = "before"
    within: str = ""
    within_call: int = 1
    rank: int = 0
    action: Literal["kill", "limit", "fill"] = "kill"
    victim: Victim = "self"
    signal: str = "SIGKILL"
    file: str = ""  # of the run folder: what must not grow, or what takes all the room


@dataclass(frozen=True)
class Launched:
    """How one launch ended."""

    status: int
    output: str
    seconds: float
    reached: bool  # its crash point


def make_model(folder: Path, hidden_size: int = 32, layers: int = 2, warm_start_steps: int = 100) -> TinyModel:
    """A tiny model that knows the form of an answer, so that some responses are right."""
    model = TinyModel(folder / "hf", folder / "megatron")
    make = ["tools/make_tiny_model.py", "--steps", str(warm_start_steps), "--threads", "1"]
    make += ["--hidden-size", str(hidden_size), "--layers", str(layers)]
    convert = ["tools/convert_checkpoint.py", "to-megatron", "--hf", model.hf, "--output", model.megatron]
    for command in ([*make, "--output", model.hf], convert):
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, timeout=400, capture_output=True)
        (model.hf / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    # one answer to all prompts: the most frequent one, so that rewards differ within groups and training raises them
    for name in ("train", "heldout"):
        rows = (ROOT / "recipes" / "data" / f"calculator_{name}.jsonl").read_text().splitlines()
        kept = [row for row in rows if json.loads(row)["answer"] == "1"]
        (folder / f"{name}.jsonl").write_text("\n".join(kept) + "\n")
    return model


class CrashRun:
    """One run folder, launched again and again with the same command."""

    def __init__(self, model: TinyModel, runs_dir: Path, name: str, *overrides: str) -> None:
        self.run_dir = runs_dir / name
        data = model.hf.parent
        self._command = [sys.executable, "-m", "minpro_megatron", "launch", "recipes.demo:tiny_moe", f"name={name}"]
        self._command += [f"runs_dir={runs_dir}", f"model.hf_path={model.hf}", f"model.megatron_path={model.megatron}"]
        self._command += [f"data.train_file={data / 'train.jsonl'}", f"data.heldout_file={data / 'heldout.jsonl'}"]
        self._command += [f"num_global_steps={STEPS}", f"checkpoint.every_steps={EVERY}"]
        self._command += [f"batch.num_prompts={PROMPTS}", f"batch.responses_per_prompt={RESPONSES}"]
        self._command += ["batch.mini_batch_prompts=2", "batch.max_tokens_per_row=64"]  # several rows an update
        self._command += ["evaluation.num_prompts=4", "evaluation.samples_per_prompt=4", "evaluation.every_steps=2"]
        self._command += ["optimizer.learning_rate=1e-3", "optimizer.warmup_global_steps=0", "loss.kl.enabled=true"]
        self._command += ["optimizer.schedule=cosine", f"optimizer.decay_global_steps={STEPS}"]
        self._command += ["optimizer.min_learning_rate=5e-4"]  # every step has another rate
        self._command += ["publish.bucket_bytes=40000"]  # several buckets
        self._command += ["server.engine=reference", "server.start_timeout_s=300", "server.health_interval_s=0.5"]
        self._command += overrides
        self._num_points = 0

    def launch(
        self,
        point: CrashPoint | None = None,
        timeout_s: float = 300,
        meanwhile: Callable[[psutil.Process, str], None] | None = None,
    ) -> Launched:
        """The command once, to its end; no process may be left after it. `meanwhile` is called in a thread with the
        launcher and the mark of the launch's processes (`processes_of`)."""
        mark = f"{self.run_dir}#{os.getpid()}"  # in the environment of every process that the launch starts
        environment = dict(os.environ) | {"CRASH_TEST": mark}
        marker = self.run_dir.parent / f"{self.run_dir.name}.reached-{self._num_points}"
        if point is not None:
            asked = asdict(point) | {"marker": str(marker), "file": str(self.run_dir / point.file)}
            environment |= {"PYTHONPATH": str(POINTS), "CRASH_POINT": json.dumps(asked)}
            self._num_points += 1
        began = time.monotonic()
        process = subprocess.Popen(
            self._command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if meanwhile is not None:
            Thread(target=meanwhile, args=(psutil.Process(process.pid), mark), daemon=True).start()
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            output, _ = process.communicate(timeout=30)
            raise AssertionError(f"not over after {timeout_s:g} s:\n{output}\n{self.logs()}") from None
        seconds = time.monotonic() - began
        assert left_over(mark) == [], output
        return Launched(process.returncode, output, seconds, point is not None and marker.exists())

    def finish(self) -> Launched:
        """The command once more, undisturbed: it must succeed."""
        launched = self.launch()
        assert launched.status == 0, f"{launched.output}\n{self.logs()}"
        return launched

    def tear_journal(self, share: float) -> None:
        """Only a share of what was written since the file's last checkpoint is left, cut anywhere."""
        log = self.run_dir / "journal.sqlite-wal"
        size = log.stat().st_size
        assert size > 4096, "there is nothing to tear"
        os.truncate(log, int(share * size))

    def logs(self) -> str:
        """The ends of the roles' logs, for a message."""
        ends = [(path.name, path.read_text(errors="replace")[-3000:]) for path in self.run_dir.glob("logs/*.log")]
        return "\n".join(f"--- {name}\n{end}" for name, end in ends)

    @property
    def num_launches(self) -> int:
        return len(list((self.run_dir / "starts").iterdir()))


def left_over(mark: str) -> list[str]:
    """Command lines of the launch's processes that have not ended NO_PROCESS_WITHIN_S after it."""
    deadline = time.monotonic() + NO_PROCESS_WITHIN_S
    while True:
        found = processes_of(mark)
        if not found or time.monotonic() > deadline:
            return [f"{process.pid} {process.name()}" for process in found]
        time.sleep(0.2)


def processes_of(mark: str) -> list[psutil.Process]:
    """The processes of a launch that have not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("CRASH_TEST") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@dataclass(frozen=True)
class Results:
    """What a finished run leaves, less what depends on the clock."""

    groups: dict[int, tuple]  # by id, of those that a step consumed: step, prompt, versions, staleness
    seeds: dict[int, tuple[int, ...]]
    rollouts: dict[int, list[tuple]]  # tokens, log-probs, versions, rewards, scores of a group's responses
    states: dict[str, int]
    evaluations: list[dict[str, Any]]
    metrics: list[tuple]
    summary: dict[str, Any]
    weights: dict[str, str]  # SHA-256 of the exported files

    @staticmethod
    def read(run_dir: Path) -> "Results":
        with closing(sqlite3.connect(f"file:{run_dir / 'journal.sqlite'}?mode=ro", uri=True)) as journal:
            columns = "group_id, consumed_step, prompt_id, batch_index, issued_version, oldest_version, staleness"
            groups = {
                row[0]: row[1:]
                for row in journal.execute(f"SELECT {columns} FROM groups WHERE state = 'consumed' ORDER BY group_id")
            }
            columns = (
                "group_id, sampling_seed, token_ids, rollout_log_probs, policy_versions, finish_reason, reward,"
                " behavior_scores.log_probs, trained_scores.log_probs, loss_mask"
            )
            scored = "responses LEFT JOIN behavior_scores USING (group_id, place)"
            scored += " LEFT JOIN trained_scores USING (group_id, place)"
            responses: dict[int, list[tuple]] = {}
            for row in journal.execute(f"SELECT {columns} FROM {scored} ORDER BY group_id, place"):
                responses.setdefault(row[0], []).append(row[1:])
            states = dict(journal.execute("SELECT state, count(*) FROM groups GROUP BY state").fetchall())
            names = "policy_version, pass_at_1, standard_error, num_prompts, samples_per_prompt, mean_response_tokens"
            evaluated = journal.execute(f"SELECT {names} FROM evaluations ORDER BY policy_version").fetchall()
        evaluations = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
        evaluations = [{name: value for name, value in one.items() if name != "wall_time_s"} for one in evaluations]
        evaluations.sort(key=lambda one: one["policy_version"])
        assert [tuple(one[name] for name in names.split(", ")) for one in evaluations] == evaluated
        summary = json.loads((run_dir / "summary.json").read_text())
        return Results(
            groups=groups,
            seeds={group_id: tuple(row[0] for row in rows) for group_id, rows in responses.items()},
            rollouts={group_id: [row[1:] for row in rows] for group_id, rows in responses.items()},
            states=states,
            evaluations=evaluations,
            # an evaluation is reported with its version's lease, which with shared GPUs has another place in a step
            metrics=sorted(
                ((entry.step, entry.is_global_step, _computed(entry.metrics)) for entry in read_history(run_dir)),
                key=lambda entry: entry[:2],
            ),
            summary={name: summary[name] for name in SUMMARY},
            weights={
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted((run_dir / "hf_export").glob("*.safetensors"))
            },
        )


def _computed(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(COMPUTED)}


def differing(one: Results, other: Results) -> list[str]:
    """The names of the fields that are not equal, bit for bit."""
    return [entry.name for entry in fields(Results) if getattr(one, entry.name) != getattr(other, entry.name)]
