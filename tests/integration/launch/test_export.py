"""A run's checkpoint as weights: which one is exported, bit by bit, and what begins with it."""

import json
import re
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from minpro_megatron.__main__ import main
from minpro_megatron.checkpoints.manifest import (
    FileRecord,
    RunIdentity,
    RunManifest,
    WeightDtype,
    from_json,
    read_manifest,
    to_json,
)
from minpro_megatron.checkpoints.run_checkpoint import is_exported_from
from minpro_megatron.conversion.convert import to_hf, to_megatron
from minpro_megatron.errors import UserError
from minpro_megatron.launch import evaluation_model
from minpro_megatron.launch.evaluation_model import with_hf_model
from minpro_megatron.launch.evaluation_options import EvaluationOptions
from minpro_megatron.launch.export import chosen
from minpro_megatron.launch.preflight.run_checks import problems
from minpro_megatron.models.architecture import read_architecture
from tests.support.hf_models import MIXTURE, Watch, assert_same_files, make_model
from tests.support.run_examples import example_config, write_example_files


def saved(run_dir: Path, version: int, hf: Path, score: float | None = None, dtype: WeightDtype = "bfloat16") -> Path:
    """The run's checkpoint of that version with the weights of `hf`, as converted files under a run's manifest."""
    folder = run_dir / "checkpoints" / f"step-{version:06d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    to_megatron(hf, folder, Watch())
    for path in (folder / "hf").iterdir():  # a trainer writes no texts
        path.unlink()
    (folder / "hf").rmdir()
    files = read_manifest(folder).files
    architecture = asdict(read_architecture(hf))
    run = RunIdentity(seed=0, objective="minpro", dtype=dtype, parallel={}, architecture=architecture)
    manifest = RunManifest(
        policy_version=version,
        updates=4 * version,
        run=run,
        created=datetime.now(UTC),
        score=score,
        files={
            name: FileRecord(bytes=file.bytes, sha256=file.sha256)
            for name, file in files.items()
            if not name.startswith("hf/")
        },
    )
    (folder / "manifest.json").write_text(to_json(manifest))
    (folder.parent / "latest").write_text(f"{folder.name}\n")
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that began with tmp_path/hf."""
    make_model(tmp_path / "hf", MIXTURE | {"dtype": "float32"}, num_files=3)
    config = example_config(tmp_path, model={"hf_path": str(tmp_path / "hf"), "megatron_path": "", "dtype": "float32"})
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "run.json").write_text(config.to_json())
    return config.run_dir


def test_a_run_checkpoint_becomes_the_folder_that_its_weights_came_from(tmp_path: Path, run_dir: Path) -> None:
    trained = make_model(tmp_path / "trained", MIXTURE | {"dtype": "float32"}, num_files=3)
    folder = saved(run_dir, 10, trained)
    to_hf(folder, tmp_path / "out", Watch(), verify=True)
    stated = json.loads((tmp_path / "out" / "exported_from.json").read_text())
    assert (stated["checkpoint"], stated["policy_version"]) == (str(folder), 10)
    # transformers rounds weights to the dtype that config.json names: it must be theirs
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == MIXTURE | {"dtype": "bfloat16"}
    for name in ("exported_from.json", "config.json"):
        (tmp_path / "out" / name).unlink()
    (trained / "config.json").unlink()
    assert_same_files(tmp_path / "out", trained)
    (run_dir / "run.json").unlink()
    with pytest.raises(UserError, match=r"cannot be read .*No such file.*; give --hf-reference"):
        to_hf(folder, tmp_path / "again", Watch())
    to_hf(folder, tmp_path / "again", Watch(), reference=tmp_path / "hf")


def test_the_command_exports_the_version_that_is_asked_for(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = "model-00002-of-00003.safetensors"
    for version, score in ((2, 0.25), (4, 0.75), (6, 0.5)):
        saved(run_dir, version, make_model(tmp_path / f"trained-{version}", MIXTURE, num_files=3), score)
    for words, version in (([], 4), (["--version", "last"], 6), (["--version", "2", "--verify"], 2)):
        output = tmp_path / f"out-{version}"
        assert main(["export", "--run", str(run_dir), "--output", str(output), *words]) == 0
        assert json.loads((output / "exported_from.json").read_text())["policy_version"] == version
        assert f"wrote {output}: policy version {version} of {run_dir}, evaluation score 0." in capsys.readouterr().out
        assert (output / file).read_bytes() == (tmp_path / f"trained-{version}" / file).read_bytes()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("best", "--version best: none of the checkpoints 2, 4 was evaluated; give a version or last"),
        ("3", "--version 3: there is no such checkpoint in .*; there are those of 2, 4"),
        ("step-000002", "--version step-000002: give best, last or a policy version, such as 4"),
    ],
)
def test_a_version_that_is_not_there_is_refused(tmp_path: Path, run_dir: Path, version: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--run {run_dir}: no complete checkpoint in"):
        chosen(run_dir, version)
    for number in (2, 4):
        saved(run_dir, number, tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        chosen(run_dir, version)


def test_of_equal_scores_the_newer_version_is_the_best(tmp_path: Path, run_dir: Path) -> None:
    for version in (2, 4):
        saved(run_dir, version, tmp_path / "hf", score=0.5)
    assert chosen(run_dir, "best").policy_version == 4


def test_a_run_begins_with_a_checkpoint_and_its_export(tmp_path: Path, run_dir: Path) -> None:
    """And not with a checkpoint and another model: trainer and servers would hold different weights."""
    (tmp_path / "example").mkdir()
    write_example_files(tmp_path / "example")
    folder = saved(run_dir, 10, tmp_path / "hf")
    to_hf(folder, tmp_path / "out", Watch())
    assert is_exported_from(tmp_path / "out", folder)
    scored = msgspec.structs.replace(from_json((folder / "manifest.json").read_bytes()), score=0.5)
    (folder / "manifest.json").write_text(to_json(scored))

    def found(hf: Path) -> list[str]:
        model = {"hf_path": str(hf), "megatron_path": str(folder), "dtype": "float32"}
        config = example_config(tmp_path / "example", model=model, parallel={"tensor": 1})
        return [problem for problem in problems(config) if "megatron_path" in problem]

    assert found(tmp_path / "out") == []
    (problem,) = found(tmp_path / "hf")
    assert re.match(r"model.megatron_path = .*: a run's checkpoint, and model.hf_path = .* was not exported", problem)


def test_an_evaluation_of_a_checkpoint_writes_its_weights_once(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_model, "byte_progress", Watch())
    folder = saved(run_dir, 10, tmp_path / "hf")
    options = EvaluationOptions(model=str(folder), benchmarks=["gsm8k"], output=tmp_path / "out")
    written = Path(with_hf_model(options).model)
    assert written == tmp_path / "out" / "model"
    before = (written / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    assert with_hf_model(options).model == str(written)
    assert (written / "model-00001-of-00003.safetensors").stat().st_mtime_ns == before
    other = saved(run_dir, 12, make_model(tmp_path / "other", MIXTURE))
    with pytest.raises(UserError, match=r"--output .*/out: it contains the evaluation of another checkpoint"):
        with_hf_model(EvaluationOptions(model=str(other), benchmarks=["gsm8k"], output=tmp_path / "out"))
    external = EvaluationOptions(
        model=str(other), benchmarks=["gsm8k"], output=tmp_path / "external", settings={"server.urls": ["http://a:1"]}
    )
    assert with_hf_model(external).model == str(tmp_path / "hf")
    plain = EvaluationOptions(model=str(tmp_path / "hf"), benchmarks=["gsm8k"], output=tmp_path / "plain")
    assert with_hf_model(plain) is plain
