"""The stability study's runs: the same as real launches, the same again after a kill, and a report out of them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from benchmarks.stability_study.curves import read_stored, responses_digest
from benchmarks.stability_study.grid import DELAYS, RunKey
from benchmarks.stability_study.report import BEGIN, END, PICTURES, write_report
from benchmarks.stability_study.work import run_missing, stored_path
from minpro_megatron.buffer.journal_reader import JournalReader
from tests.e2e import digits_reward
from tests.e2e.conftest import ROOT, TinyModel
from tests.support.study_runs import made_run

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(600)]

INPUTS = "tiny"
KEYS = [RunKey("minpro", 2, 1, 1e-3), RunKey("m2po", 0, 1, 1e-3)]


def settings(model: TinyModel) -> list[str]:
    """Random weights, five steps of two updates, a reward that such a model earns now and then."""
    data = ROOT / "recipes" / "data"
    return [
        "num_global_steps=5", f"model.hf_path={model.hf}", f"model.megatron_path={model.megatron}",
        f"data.train_file={data / 'calculator_steps_train.jsonl'}",
        f"data.heldout_file={data / 'calculator_steps_heldout.jsonl'}",
        f"reward.function={digits_reward.__name__}:grade", "sampling.max_response_tokens=8",
        "batch.num_prompts=8", "batch.mini_batch_prompts=4", "batch.responses_per_prompt=4",
        "evaluation.num_prompts=8", "evaluation.samples_per_prompt=2", "evaluation.every_steps=2",
    ]  # fmt: skip


def test_a_run_is_that_of_a_real_launch(tiny_model: TinyModel, tmp_path: Path) -> None:
    key, results = KEYS[0], tmp_path / "results"
    assert run_missing([key], results, tmp_path / "study", INPUTS, 1, settings(tiny_model)) == 0
    ours = read_stored(stored_path(results, key))
    launched = key.config(str(tmp_path / "launched"), *settings(tiny_model))
    words = [f"name={launched.name}", f"runs_dir={launched.runs_dir}", f"seed={key.seed}", "objective.name=minpro"]
    words += ["staleness.delay_steps=2", f"optimizer.learning_rate={key.learning_rate}", *settings(tiny_model)]
    command = [sys.executable, "-m", "minpro_megatron", "launch", "recipes.stability_study:run", *words]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500, capture_output=True)

    digests = []
    with JournalReader(launched.run_dir) as journal:
        for step in range(5):
            groups = list(journal.groups("state = 'consumed' AND consumed_step = ?", (step,)))
            groups.sort(key=lambda group: group.group_id)
            tokens = [response.token_ids for group in groups for response in group.responses]
            digests.append(responses_digest(one for one in tokens if one is not None))
    assert digests == ours.responses
    assert len(set(digests)) == 5

    lines = [json.loads(line)["metrics"] for line in (launched.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [metrics for metrics in lines if "objective/loss" in metrics]
    for name, metric in (
        ("loss", "objective/loss"),
        ("entropy", "policy/entropy"),
        ("grad_norm", "optimizer/grad_norm"),
        ("accuracy", "reward/accuracy"),
        ("log_ratio_square", "ratio/log_second_moment"),
    ):
        theirs = [step[metric] for step in steps]
        assert np.allclose(ours.columns[name], theirs, rtol=1e-4, atol=1e-7), name
    assert max(abs(loss) for loss in ours.columns["loss"]) > 1e-3  # there is something to compare
    assert ours.columns["staleness"] == [0, 1, 2, 2, 2]
    evaluated = [json.loads(line) for line in (launched.run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [entry["policy_version"] for entry in evaluated] == ours.versions == [0, 2, 4, 5]
    assert np.allclose([entry["pass_at_1"] for entry in evaluated], ours.heldout, atol=1e-5)


def run_study(tiny_model: TinyModel, folder: Path) -> subprocess.Popen[str]:
    """Both runs, one after the other, in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from tests.e2e.test_stability_study import *; "
        "model = TinyModel(Path(sys.argv[1]), Path(sys.argv[2])); folder = Path(sys.argv[3]); "
        "sys.exit(run_missing(KEYS, folder / 'results', folder / 'runs', INPUTS, 1, settings(model)))"
    )
    command = [sys.executable, "-c", code, str(tiny_model.hf), str(tiny_model.megatron), str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_killed_study_goes_on_to_the_same_curves(tiny_model: TinyModel, tmp_path: Path) -> None:
    paths = {name: [stored_path(tmp_path / name / "results", key) for key in KEYS] for name in ("killed", "whole")}
    killed = run_study(tiny_model, tmp_path / "killed")
    second_run = tmp_path / "killed" / "runs" / KEYS[1].name / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (second_run.exists() and second_run.stat().st_size):  # it trains
        assert killed.poll() is None, killed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    left = psutil.Process(killed.pid).children(recursive=True)
    killed.send_signal(signal.SIGKILL)
    killed.wait(10)
    assert psutil.wait_procs(left, timeout=30)[1] == []  # nobody trains on behind its back
    assert paths["killed"][0].exists()
    assert not paths["killed"][1].exists()
    first_written = paths["killed"][0].stat().st_mtime_ns

    for name in ("killed", "whole"):
        study = run_study(tiny_model, tmp_path / name)
        output = study.communicate(timeout=300)[0]
        assert study.returncode == 0, output
        assert f"{int(name == 'killed')} of 2 runs are there" in output
    assert paths["killed"][0].stat().st_mtime_ns == first_written  # not repeated
    for killed_path, whole_path in zip(paths["killed"], paths["whole"], strict=True):
        assert killed_path.read_bytes() == whole_path.read_bytes()


def test_the_report_is_made_of_the_stored_curves_alone(tmp_path: Path) -> None:
    from benchmarks.stability_study.curves import write_stored
    from benchmarks.stability_study.grid import sweep_keys

    results, folder = tmp_path / "results", tmp_path / "study"
    keys = [RunKey(name, delay, seed, 2.5e-4) for name in ("minpro", "grpo") for delay in DELAYS for seed in (0, 1)]
    for key in [*keys, *sweep_keys()]:
        write_stored(stored_path(results, key), made_run(key, heldout=(0.2, 0.4, 0.5 + 0.1 * key.seed % 2)))
    folder.mkdir()
    document = folder.with_suffix(".md")
    document.write_text(f"My reading.\n{BEGIN}\n{END}\n")
    pictures = []
    for _ in range(2):
        write_report(results, 2.5e-4, folder)
        pictures.append({name: (folder / name).read_bytes() for name in PICTURES})
    assert pictures[0] == pictures[1]
    text = document.read_text()
    assert text.startswith("My reading.")
    assert "12 runs, 2 seeds" in text
    assert all(f"(study/{name})" in text or f"(stability_study/{name})" in text for name in PICTURES)
