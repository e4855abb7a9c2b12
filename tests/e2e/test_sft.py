"""Supervised fine-tuning from end to end: without servers, interrupted and resumed to the same bits, and learnt."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from minpro_megatron.monitor.summary import RunSummary
from tests.e2e.conftest import Launch, Launcher

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(560)]  # more than the waits of the test together

NUM_ROWS, STEPS = 12, 30
# What follows from the weights and the batches, and from no clock.
COMPUTED = ("objective/", "optimizer/", "policy/", "response/", "batch/")


def settings(folder: Path, num_steps: int = STEPS) -> list[str]:
    rows = [{"id": f"d{n}", "prompt": f"{n}+{n}=", "response": f"{2 * n}"} for n in range(NUM_ROWS)]
    path = folder / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["objective.name=sft", f"data.demonstrations={path}", "staleness.delay_steps=0"]
    given += ["evaluation.every_steps=0"]
    given += ["batch.responses_per_prompt=1", "batch.num_prompts=8", "batch.mini_batch_prompts=4"]
    given += ["optimizer.learning_rate=1e-3", "optimizer.warmup_global_steps=0", "checkpoint.every_steps=2"]
    return [*given, f"num_global_steps={num_steps}", "parallel.tensor=2", "parallel.expert=2"]


def computed(launch: Launch) -> list[dict[str, float]]:
    """The metrics of each global step that must be the same whenever it is computed. A step that a killed start had
    made after its last checkpoint is in the file twice; the later line counts."""
    lines = [json.loads(line) for line in (launch.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["metrics"] for line in lines if "objective/loss" in line["metrics"]}
    assert sorted(steps) == list(range(STEPS))
    return [{name: value for name, value in steps[step].items() if name.startswith(COMPUTED)} for step in range(STEPS)]


@pytest.mark.long
def test_a_run_on_demonstrations_is_resumed_to_the_bit(launches: Launcher, tmp_path: Path) -> None:
    whole = launches("whole", *settings(tmp_path))
    status, output = whole.wait(170)
    assert status == 0, output
    assert [path.name for path in (whole.run_dir / "logs").glob("*.log")] == ["train.log"]
    assert not (whole.run_dir / "journal.sqlite").exists()
    steps = computed(whole)
    assert len(steps) == STEPS
    losses = [metrics["objective/loss"] for metrics in steps]
    assert losses[-1] < 0.6 * losses[0]  # twenty epochs
    names = {name for metrics in steps for name in metrics}
    assert {"objective/loss", "policy/entropy", "batch/tokens", "response/length_mean"} <= names
    summary = RunSummary.model_validate_json((whole.run_dir / "summary.json").read_text())
    assert (summary.updates, summary.groups_consumed, summary.servers) == (2 * STEPS, 8 * STEPS, None)
    assert (whole.run_dir / "report.html").stat().st_size > 10_000

    torn = launches("torn", *settings(tmp_path))
    torn.wait_for("checkpoints/latest", 120)
    for process in [torn.process, *torn.descendants()]:
        process.send_signal(signal.SIGKILL)
    torn.process.communicate()
    again = launches("torn", *settings(tmp_path))
    status, output = again.wait(170)
    assert status == 0, output
    assert "it resumes from its checkpoint after global step" in output
    assert computed(again) == steps
    weights = [load_file(launch.run_dir / "hf_export" / "model.safetensors") for launch in (whole, again)]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])

    longer = settings(tmp_path, STEPS + 1)
    (tmp_path / "sft.jsonl").write_text('{"id": "a", "prompt": "1", "response": "2"}\n')
    status, output = launches("torn", *longer).wait(60)
    assert status == 2
    assert "the content of data.demonstrations is not that with which the run" in output
