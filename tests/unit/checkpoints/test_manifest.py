"""A Megatron folder is what its manifest says, or refused."""

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minpro_megatron.checkpoints.file_records import file_records, verify_files
from minpro_megatron.checkpoints.manifest import (
    ModelManifest,
    RunIdentity,
    RunManifest,
    check_architecture,
    read_manifest,
    write_manifest,
)
from tests.support.tiny_architecture import TINY


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in (("small", "a" * 10), ("large", "b" * 100)):
        (tmp_path / name).write_text(content)
    with file_records(tmp_path) as written:
        written.add("small")
        written.add("large")
        files = written.records()
    write_manifest(tmp_path, ModelManifest(source="test", dtype="bfloat16", architecture=TINY, files=files))
    return tmp_path


def test_a_manifest_is_read_back(folder: Path) -> None:
    found = read_manifest(folder)
    assert found.architecture == TINY
    assert {name: record.bytes for name, record in found.files.items()} == {"small": 10, "large": 100}
    # as `sha256sum` gives it
    assert found.files["small"].sha256 == "bf2cb58a68f684d95a3b78ef8f661c9a4e5b09e82cc8f9cc88cce90528caeb27"
    announced: list[int] = []
    verify_files(folder, found, thoroughly=True, announce=announced.append)
    assert sum(announced) == 110


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 1}, r"manifest.json: Invalid enum value 1 - at `\$.format_version`; convert again"),
        ({"architecture": None}, r"manifest.json: Expected `object`, got `null` - at `\$.architecture`; convert again"),
        ({"dtype": "int8"}, r"manifest.json: Invalid enum value 'int8' - at `\$.dtype`; convert again"),
        ({"more": 1}, r"manifest.json: Object contains unknown field `more`; convert again"),
        ({"source": "other"}, r"manifest.json: its content does not match its digest, so it is damaged; convert again"),
    ],
)
def test_another_manifest_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=message):
        read_manifest(folder)


def test_a_manifest_of_earlier_versions_has_no_digest(folder: Path) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    del content["digest"]
    (folder / "manifest.json").write_text(json.dumps(content))
    assert read_manifest(folder).source == "test"


def test_the_manifest_of_a_run_describes_its_weights(folder: Path) -> None:
    identity = RunIdentity(
        seed=0, objective="minpro", dtype="float32", parallel={}, architecture=dataclasses.asdict(TINY)
    )
    files = read_manifest(folder).files
    manifest = RunManifest(policy_version=7, updates=9, run=identity, created=datetime.now(UTC), files=files)
    write_manifest(folder, manifest)
    found = read_manifest(folder)
    assert (found.source, found.dtype, found.architecture) == ("step-000007", "float32", TINY)
    assert found == manifest
    other = msgspec.structs.replace(identity, architecture={"num_layers": 2})
    write_manifest(folder, msgspec.structs.replace(manifest, run=other))
    with pytest.raises(ValueError, match=r"run.architecture: Object missing required field `name`.*; use the version"):
        read_manifest(folder)


def test_a_missing_or_damaged_manifest_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no manifest.json, .*; run `minpro convert"):
        read_manifest(folder / "absent")
    (folder / "manifest.json").write_text('{"format_version": 2')
    with pytest.raises(ValueError, match=r"manifest.json: Expecting .*; convert again"):
        read_manifest(folder)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    check_architecture(folder, read_manifest(folder), TINY)
    with pytest.raises(
        ValueError, match=r"num_layers = 2, but the Hugging Face config.json says 6; convert that model"
    ):
        check_architecture(folder, read_manifest(folder), dataclasses.replace(TINY, num_layers=6))
