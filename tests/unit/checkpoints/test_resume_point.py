"""The manifest of a checkpoint, the file `latest`, and the folder of checkpoints through every kind of end."""

import errno
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minpro_megatron.checkpoints.checkpoint_folder import CheckpointFolder, score_of, superseded
from minpro_megatron.checkpoints.manifest import RunManifest, folder_name, to_json
from minpro_megatron.checkpoints.resume_point import (
    CHECKPOINTS,
    read_latest,
    read_run_manifest,
    refuse_other_run,
    version_of,
)
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.errors import UserError
from minpro_megatron.records import EvaluationResult
from tests.support.checkpoint_shards import DATA, RUN, manifest_of, write_shards


def add(folder: CheckpointFolder, version: int) -> None:
    folder.publish(write_shards(folder.new_partial(version)), manifest_of(version))


def opened(run_dir: Path, keep_last: int = 2, keep_best: int = 0) -> CheckpointFolder:
    return CheckpointFolder(run_dir / CHECKPOINTS, CheckpointConfig(keep_last=keep_last, keep_best=keep_best))


def versions(run_dir: Path) -> list[int]:
    names = [path.name for path in (run_dir / CHECKPOINTS).iterdir() if path.name != "latest"]
    found = [version_of(name) for name in names]
    assert None not in found, names
    return sorted(version for version in found if version is not None)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_a_manifest_comes_back_as_it_was(tmp_path):
    manifest = msgspec.structs.replace(manifest_of(10), score=0.625)
    folder = tmp_path / manifest.folder_name
    folder.mkdir()
    (folder / "manifest.json").write_text(to_json(manifest))
    assert folder.name == "step-000010"
    assert read_run_manifest(folder) == manifest


def test_names_sort_as_versions_and_only_our_own_are_read():
    assert [version_of(folder_name(version)) for version in (0, 10, 1_234_567)] == [0, 10, 1_234_567]
    for name in ("step-10", "step-0000010", "step-00001x", "../step-000010", ".step-000010.partial", ""):
        assert version_of(name) is None, name


def test_a_run_without_a_checkpoint_has_none(tmp_path):
    assert read_latest(tmp_path) is None
    write_shards(opened(tmp_path).new_partial(10))
    assert read_latest(tmp_path) is None


def test_latest_is_the_one_published_last(tmp_path):
    folder = opened(tmp_path)
    for version in (10, 20):
        add(folder, version)
        assert read_latest(tmp_path) == manifest_of(version)


def _truncate(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").write_bytes(DATA[:-1])


def _lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()


def _lose_it_all(checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.with_name("elsewhere"))


def _lose_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def _cut_the_manifest(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text()[:40])


def _other_format(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 3'))


def _other_version(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(path.read_text().replace('"policy_version": 20', '"policy_version": 21'))


DAMAGES: dict[Any, str] = {
    _truncate: "4 bytes, but manifest.json says 5",
    _lose_a_file: "no such file",
    _lose_it_all: "No such file",
    _lose_the_manifest: "No such file",
    _cut_the_manifest: "manifest.json: ",
    _other_format: "format_version",
    _other_version: "its content does not match its digest",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_latest_is_refused_and_the_newest_whole_one_named(tmp_path, damage):
    folder = opened(tmp_path, keep_last=3)
    for version in (5, 10, 20):
        add(folder, version)
    damage(tmp_path / CHECKPOINTS / "step-000020")
    with pytest.raises(
        ValueError, match=rf"step-000020.*{DAMAGES[damage]}.*; step-000010 is complete: write this name"
    ):
        read_latest(tmp_path)
    (tmp_path / CHECKPOINTS / "latest").write_text("step-000010\n")
    assert read_latest(tmp_path) == manifest_of(10)


def test_without_another_complete_checkpoint_it_says_how_to_start_again(tmp_path):
    add(opened(tmp_path), 10)
    _truncate(tmp_path / CHECKPOINTS / "step-000010")
    with pytest.raises(ValueError, match="there is no other checkpoint: remove"):
        read_latest(tmp_path)


@pytest.mark.parametrize("name", ["step-000020/manifest.json", "latest"])
def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path, name):
    """Of the files that are read before a run starts; a byte of the others is noticed when they are loaded."""
    folder = opened(tmp_path, keep_last=3)
    for version in (10, 20):
        add(folder, version)
    path = tmp_path / CHECKPOINTS / name
    written = path.read_bytes()
    expected = read_latest(tmp_path)
    refused = 0
    for place in range(len(written)):
        bit = (0, 3, 5)[place % 3]
        flipped = bytearray(written)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        found: RunManifest | list[str] | None
        try:
            found = read_latest(tmp_path)
        except UserError as error:
            found = error.problems
            refused += 1
        assert found == expected or (isinstance(found, list) and len(found) == 1), (place, bit)
    assert refused > 2 / 3 * len(written)  # all but white space and the digits of equal numbers


def test_a_checkpoint_of_an_earlier_version_has_no_digest(tmp_path):
    add(opened(tmp_path), 10)
    path = tmp_path / CHECKPOINTS / "step-000010" / "manifest.json"
    content = json.loads(path.read_text())
    del content["digest"]
    path.write_text(json.dumps(content))
    assert read_latest(tmp_path) == manifest_of(10)


@pytest.mark.parametrize("text", ["", "../../etc\n", "step-10\n", "\udcff"])
def test_latest_names_a_checkpoint_or_is_refused(tmp_path, text):
    add(opened(tmp_path), 10)
    (tmp_path / CHECKPOINTS / "latest").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"is not the name of a checkpoint.*step-000010 is complete"):
        read_latest(tmp_path)


@pytest.mark.parametrize(
    ("scores", "keep_last", "keep_best", "gone"),
    [
        ({10: None, 20: None, 30: None}, 2, 1, {10}),
        ({10: 0.5, 20: 0.4, 30: None, 40: None}, 1, 1, {20, 30}),
        ({10: 0.5, 20: 0.5, 30: 0.1}, 1, 1, {10}),  # of equal scores the newer
        ({10: 0.5, 20: 0.4, 30: 0.9}, 1, 1, {10, 20}),  # the best may be among the newest
        ({10: 0.5, 20: 0.4, 30: 0.3}, 1, 0, {10, 20}),
        ({10: 0.1, 20: 0.3, 30: 0.2, 40: None}, 1, 2, {10}),
        ({10: 0.1}, 3, 3, set()),
    ],
)
def test_the_newest_and_the_best_are_kept(scores, keep_last, keep_best, gone):
    assert superseded(scores, keep_last, keep_best) == gone


def test_old_checkpoints_go_and_the_best_stays_also_over_a_restart(tmp_path):
    folder = opened(tmp_path, keep_last=1, keep_best=1)
    folder.note_score(10, 0.75)  # may come before its checkpoint
    for version in (10, 20):
        add(folder, version)
    folder.note_score(20, 0.5)
    assert read_run_manifest(tmp_path / CHECKPOINTS / "step-000010").score == 0.75
    folder = opened(tmp_path, keep_last=1, keep_best=1)
    add(folder, 30)
    assert versions(tmp_path) == [10, 30]
    folder.note_score(30, 0.8)
    folder.note_score(7, 1.0)  # has no checkpoint
    add(folder, 40)
    assert versions(tmp_path) == [30, 40]
    assert read_latest(tmp_path) == manifest_of(40)


@pytest.mark.parametrize(("by", "kept"), [("mean_reward", 20), ("accuracy", 10)])
def test_the_best_is_of_the_highest_mean_reward_unless_accuracy_is_asked_for(tmp_path, by, kept):
    """With rewards from -1 to 1, of which none may be a right response's."""
    settings = CheckpointConfig(keep_last=1, keep_best=1, keep_best_by=by)
    folder = CheckpointFolder(tmp_path / CHECKPOINTS, settings)
    for version, accuracy, mean_reward in ((10, 0.25, -0.75), (20, 0.0, -0.5), (30, 0.125, -1.0)):
        result = EvaluationResult(
            policy_version=version, pass_at_1=accuracy, standard_error=0.1, mean_reward=mean_reward, not_graded=0,
            num_prompts=2, samples_per_prompt=2, mean_response_tokens=3.5, wall_time_s=1.5,
        )  # fmt: skip
        folder.note_score(version, score_of(result, settings))
        add(folder, version)
    add(folder, 40)
    assert versions(tmp_path) == [kept, 40]


def test_a_line_that_was_given_up_stays_until_the_new_one_has_a_checkpoint(tmp_path, caplog):
    folder = opened(tmp_path, keep_last=4)
    for version in (10, 20, 25, 30):
        add(folder, version)
    folder.note_score(30, 0.9)
    (tmp_path / CHECKPOINTS / "latest").write_text("step-000010\n")
    folder = opened(tmp_path, keep_last=4)
    assert versions(tmp_path) == [10, 20, 25, 30]
    add(folder, 20)
    assert versions(tmp_path) == [10, 20]
    assert "was resumed from an earlier one" in caplog.text
    assert read_latest(tmp_path) == manifest_of(20)


def test_only_leftovers_of_our_own_are_removed(tmp_path):
    add(opened(tmp_path), 10)
    checkpoints = tmp_path / CHECKPOINTS
    leftovers = [".step-000020.0123abcd.partial", ".step-000020.0123abcd.removed"]
    others = ["step-000020.partial", ".step-000020.partial", "notes", ".snapshot"]
    for name in leftovers + others:
        (checkpoints / name).mkdir()
        write_shards(checkpoints / name)
    (checkpoints / ".latest.77.tmp").write_text("step-0000")
    opened(tmp_path)
    assert {path.name for path in checkpoints.iterdir()} == {"latest", "step-000010", *others}


def test_two_attempts_at_a_version_never_share_a_folder(tmp_path):
    folder = opened(tmp_path)
    assert folder.new_partial(10) != folder.new_partial(10)


def test_another_runs_checkpoint_is_refused(tmp_path):
    refuse_other_run(tmp_path, RUN, msgspec.structs.replace(RUN, parallel={"data": 4}, objective="cispo"))
    for field, other in (
        ("seed", msgspec.structs.replace(RUN, seed=4)),
        ("num_layers", msgspec.structs.replace(RUN, architecture=RUN.architecture | {"num_layers": 6})),
        ("num_experts", msgspec.structs.replace(RUN, architecture=RUN.architecture | {"num_experts": 8})),
    ):
        with pytest.raises(ValueError, match=f"{field} = .* but this run has .*; give the run's previous settings"):
            refuse_other_run(tmp_path, RUN, other)


class Killed(BaseException):
    """What nothing catches."""


CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "open")


@contextmanager
def ending_before(change: int, error: BaseException, for_good: bool = False) -> Iterator[list[str]]:
    """Within: `error` instead of the change to the file system that comes as number `change`, and instead of all that
    follow if it is `for_good`. Gives the changes."""
    made: list[str] = []

    def counted(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) - 1 == change or (for_good and len(made) > change):
                raise error
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield made


def _replaces_20(run_dir: Path) -> CheckpointFolder:
    """A folder in which the run goes on from 10, with one that was given up at 20 and one too many at 5."""
    folder = opened(run_dir, keep_last=3)
    for version in (5, 10, 20):
        add(folder, version)
    (run_dir / CHECKPOINTS / "latest").write_text("step-000010\n")
    return opened(run_dir, keep_last=1)


def test_killed_at_any_moment_the_run_has_the_old_checkpoint_or_the_new_one(tmp_path):
    outcomes = []
    for change in itertools.count():
        run_dir = tmp_path / str(change)
        folder = _replaces_20(run_dir)
        with ending_before(change, Killed()) as made, suppress(Killed):
            add(folder, 20)
        latest = read_latest(run_dir)
        assert latest is not None
        outcomes.append(latest.policy_version)
        folder = opened(run_dir, keep_last=1)  # the next start
        assert set(versions(run_dir)) <= {5, 10, 20}
        add(folder, 30)
        assert versions(run_dir) == [30]
        if len(made) <= change:
            break
    assert len(outcomes) > 12
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {10, 20}


@pytest.mark.parametrize("for_good", [False, True])
def test_an_error_at_any_moment_leaves_the_old_checkpoint_or_the_new_one(tmp_path, for_good):
    failures = 0
    for change in itertools.count():
        run_dir = tmp_path / str(change)
        folder = _replaces_20(run_dir)
        with ending_before(change, OSError(errno.ENOSPC, "No space left on device"), for_good) as made:
            try:
                partial = folder.new_partial(20)
            except OSError:
                continue
            write_shards(partial)
            try:
                folder.publish(partial, manifest_of(20))
                expected = 20
            except OSError:
                folder.discard(partial)
                expected = 10
                failures += 1
        assert read_latest(run_dir) == manifest_of(expected)
        add(folder, 30)  # the same process goes on
        assert read_latest(run_dir) == manifest_of(30)
        opened(run_dir)
        assert versions(run_dir) == [30] or for_good
        if len(made) <= change:
            break
    assert failures > 5
