"""A run continues with the data and the model that it was begun with, wherever they are."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minpro_megatron.checkpoints.file_records import record_file
from minpro_megatron.checkpoints.manifest import ModelManifest, read_manifest, write_manifest
from minpro_megatron.checkpoints.resume_point import CHECKPOINTS, LATEST
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.launch.preflight.run_checks import problems
from minpro_megatron.launch.run_folder import prepare
from minpro_megatron.launch.starts import begin_start
from minpro_megatron.report.report import write_report
from minpro_megatron.run_folder.run_inputs import InputChange, RunInputs, read_inputs, write_inputs
from tests.support.run_examples import PROMPT, TOKENIZER, example_config, save_checkpoint, write_example_files


def begun_run(folder: Path, **changes: object) -> RunConfig:
    """A run with a checkpoint after global step 2."""
    write_example_files(folder)
    config = example_config(folder, **changes)
    prepare(config, begin_start(config.run_dir).incarnation)
    save_checkpoint(config, 2)
    return config


def replace_rows(path: Path, **changes: str) -> None:
    path.write_text(json.dumps(json.loads(PROMPT) | changes) + "\n")


def convert_other_weights(folder: Path) -> None:
    """A Megatron folder of other weights."""
    weights = folder / "megatron" / "weights.distcp"
    weights.write_text("[]")
    former = read_manifest(folder / "megatron")
    files = {"weights.distcp": record_file(weights)}
    write_manifest(
        folder / "megatron", ModelManifest(source="hf", dtype="float32", architecture=former.architecture, files=files)
    )


CHANGES: dict[str, Callable[[Path], object]] = {
    "data.train_file": lambda folder: replace_rows(folder / "train.jsonl", prompt="1+3="),
    "data.heldout_file": lambda folder: replace_rows(folder / "heldout.jsonl", answer="3"),
    "model.hf_path/tokenizer.json": lambda folder: (folder / "hf" / "tokenizer.json").write_text(
        json.dumps(TOKENIZER | {"padding": None})
    ),
    "model.hf_path/chat_template.jinja": lambda folder: (folder / "hf" / "chat_template.jinja").write_text("{{ x }}"),
    "model.megatron_path": convert_other_weights,
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_content_under_the_same_name_is_refused(tmp_path: Path, name: str) -> None:
    config = begun_run(tmp_path)
    longer = with_overrides(config, ["num_global_steps=8"])
    assert problems(longer) == []
    CHANGES[name](tmp_path)
    (problem,) = problems(longer)
    assert f"the content of {name} is not that with which the run in {config.run_dir} was started" in problem
    assert "data.accept_changed_inputs=true" in problem


HOOK = "hooks_of_an_input_test:shorter"
HOOK_CODE = "def shorter(rewards, lengths): return rewards - lengths.mean() * 0\n"


def begun_run_with_a_hook(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    (folder / "hooks_of_an_input_test.py").write_text(HOOK_CODE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{os.environ.get('PYTHONPATH', '')}")
    write_example_files(folder)
    config = with_overrides(example_config(folder), [f"loss.advantage={HOOK}"])
    prepare(config, begin_start(config.run_dir).incarnation)
    save_checkpoint(config, 2)
    return config


def test_another_source_file_of_a_hook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = begun_run_with_a_hook(tmp_path, monkeypatch)
    recorded = read_inputs(config.run_dir)
    assert recorded is not None
    digest = hashlib.sha256(HOOK_CODE.encode()).hexdigest()
    assert recorded.digests[f"loss.advantage = {HOOK}"] == digest
    assert json.loads((config.run_dir / "run.json").read_text())["loss"]["advantage"] == HOOK
    assert problems(config) == []
    (tmp_path / "hooks_of_an_input_test.py").write_text(HOOK_CODE.replace("* 0", "* 1e-3"))
    (problem,) = problems(config)
    assert f"the content of loss.advantage = {HOOK} is not that with which the run in" in problem


def test_a_run_of_a_version_that_did_not_record_hooks_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = begun_run_with_a_hook(tmp_path, monkeypatch)
    recorded = read_inputs(config.run_dir)
    assert recorded is not None
    old = {name: digest for name, digest in recorded.digests.items() if HOOK not in name}
    write_inputs(config.run_dir, RunInputs(old))
    assert problems(config) == []
    prepare(config, begin_start(config.run_dir).incarnation)
    assert read_inputs(config.run_dir) == RunInputs(recorded.digests)  # from now on it is compared, and no change noted


def test_a_change_that_is_accepted_is_in_the_report(tmp_path: Path) -> None:
    config = begun_run(tmp_path)
    CHANGES["data.heldout_file"](tmp_path)
    accepting = with_overrides(config, ["data.accept_changed_inputs=true"])
    assert problems(accepting) == []
    prepare(accepting, begin_start(accepting.run_dir).incarnation)
    recorded = read_inputs(config.run_dir)
    assert recorded is not None
    assert recorded.changes == [InputChange(global_step=2, names=["data.heldout_file"])]
    assert problems(config) == []  # the accepted content is what the next start compares with
    page = write_report(config.run_dir).read_text()
    assert "From global step 2 on" in page
    assert "<strong>data.heldout_file</strong>" in page


def test_a_start_after_one_that_failed_records_what_it_reads(tmp_path: Path) -> None:
    write_example_files(tmp_path)
    config = example_config(tmp_path)
    prepare(config, begin_start(config.run_dir).incarnation)
    CHANGES["data.train_file"](tmp_path)
    assert problems(config) == []  # nothing was computed with the former rows
    prepare(config, begin_start(config.run_dir).incarnation)
    save_checkpoint(config, 2)
    assert problems(config) == []


def test_the_same_contents_may_be_in_another_place(tmp_path: Path) -> None:
    config = begun_run(tmp_path)
    moved = [f"model.hf_path={tmp_path / 'moved'}"]
    (tmp_path / "hf").rename(tmp_path / "moved")
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").rename(tmp_path / f"{name}-2.jsonl")
        moved.append(f"data.{name}_file={tmp_path / f'{name}-2.jsonl'}")
    assert problems(with_overrides(config, moved)) == []


def test_benchmarks_of_the_same_contents_may_be_in_another_place(tmp_path: Path) -> None:
    def evaluated(*files: str) -> dict[str, object]:
        benchmarks = [{"name": name, "file": str(tmp_path / file)} for name, file in zip("ab", files, strict=True)]
        return {"num_prompts": 1, "benchmarks": benchmarks}

    for name in ("a", "b", "moved"):
        replace_rows(tmp_path / f"{name}.jsonl", id=name, prompt="3*1=" if name == "b" else "5*1=")
    config = begun_run(tmp_path, evaluation=evaluated("a.jsonl", "b.jsonl"))
    moved = RunConfig.model_validate(config.model_dump() | {"evaluation": evaluated("moved.jsonl", "b.jsonl")})
    (found,) = problems(moved)
    assert "the content of evaluation.benchmarks a is not that with which" in found
    replace_rows(tmp_path / "moved.jsonl", id="a", prompt="5*1=")
    assert problems(moved) == []
    swapped = RunConfig.model_validate(config.model_dump() | {"evaluation": evaluated("b.jsonl", "a.jsonl")})
    (found,) = problems(swapped)
    assert "the content of evaluation.benchmarks a, evaluation.benchmarks b is not that with which" in found


def test_a_renamed_run_continues_under_its_new_name(tmp_path: Path) -> None:
    config = begun_run(tmp_path)
    config.run_dir.rename(tmp_path / "runs" / "renamed")
    renamed = with_overrides(config, ["name=renamed", "num_global_steps=8"])
    assert problems(renamed) == []
    config_file, goes_on = prepare(renamed, begin_start(renamed.run_dir).incarnation)
    assert goes_on
    assert RunConfig.from_json(config_file.read_text()).name == "renamed"


def test_checkpoints_without_latest_are_refused_with_the_name_to_write_into_it(tmp_path: Path) -> None:
    config = begun_run(tmp_path)
    save_checkpoint(config, 4)
    latest = config.run_dir / CHECKPOINTS / LATEST
    latest.unlink()
    (config.run_dir / "metrics.jsonl").write_text("{}\n")  # the folder holds a run, even without its journal
    (problem,) = problems(config)
    assert f"{latest} is missing" in problem
    assert "write step-000004, the newest complete checkpoint, into it" in problem
    latest.write_text("step-000004")
    assert problems(config) == []
