"""A run's checkpoints on real ranks: what is saved is what was, whatever happens while it is written."""

import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from minpro_megatron.checkpoints.manifest import TrainerState
from minpro_megatron.checkpoints.resume_point import CHECKPOINTS, read_latest
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.checkpointing_rank import CONFIG, TWO, Rank, fill_the_disk, model, start
from tests.mesh.harness import run_mesh
from tests.mesh.reference import make_model
from tests.mesh.steps import step_config
from tests.support.long_cases import long_after

__all__ = ["model", "start"]  # fixtures

pytestmark = pytest.mark.mesh


def state(version: int) -> TrainerState:
    return TrainerState(policy_version=version, updates=version)


def differing(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not np.array_equal(value, second[name])]


@contextmanager
def writing(act: Callable[[], None]) -> Iterator[None]:
    """Within: every rank's writer, here or in a process forked here, does `act` before it writes."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = FileSystemWriterAsync.write_preloaded_data

    def write(*arguments: Any, **rest: Any) -> Any:
        act()
        return original(*arguments, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriterAsync, "write_preloaded_data", staticmethod(write))
        yield


def _save_while_training(mesh: Mesh, start: tuple, asynchronous: bool) -> dict[str, Any]:
    rank = Rank(mesh, start, asynchronous=asynchronous)
    rank.update(2)
    saved = rank.numbers()
    go_on = Path(start[1], "go-on")

    def wait() -> None:
        while asynchronous and not go_on.exists():
            time.sleep(0.005)

    with writing(wait):
        rank.checkpoints.save(rank.policy, state(2))
    polled = [rank.checkpoints.poll()]
    rank.update(2)
    expected, at = rank.numbers(), [rank.latest()]
    go_on.touch()
    polled.append(rank.checkpoints.finish())
    at.append(rank.latest())

    other = Rank(mesh, start)  # as after a crash: a policy that has made no update
    assert differing(other.numbers(), {name: saved[name] for name in other.numbers()})
    other.load_latest()
    loaded = differing(other.numbers(), saved)
    other.update(2)
    continued = differing(other.numbers(), expected)

    rank.update(1, learning_rate=0.05)  # weights, moments and step are all other than those saved
    assert len(differing(rank.numbers(), saved)) == len(saved)
    rank.load_latest()
    reloaded = differing(rank.numbers(), saved)
    return {
        "polled": polled,
        "latest": at,
        "differing": (loaded, continued, reloaded),
        "processes": len(multiprocessing.active_children()),
    }


@pytest.mark.parametrize("asynchronous", long_after(1, [True, False]))
def test_the_saved_state_is_that_of_the_call_and_continues_to_the_bit(start: tuple, asynchronous: bool) -> None:
    before, after = ([], [2]) if asynchronous else ([2], [])
    for found in run_mesh(_save_while_training, start, asynchronous, **TWO):
        assert found["differing"] == ([], [], [])
        assert found["polled"] == [before, after]
        assert found["latest"] == [None if asynchronous else 2, 2]
        assert found["processes"] == 0, "a save leaves no process behind"


def _save_without_updates(mesh: Mesh, start: tuple) -> tuple[list[str], list[str]]:
    rank = Rank(mesh, start)
    rank.checkpoints.save(rank.policy, state(1))
    assert rank.checkpoints.finish() == [1]
    other = Rank(mesh, start)
    other.update(1)
    other.load_latest()
    loaded = differing(other.numbers(), rank.numbers())
    rank.update(2)
    other.update(2)
    return loaded, differing(other.numbers(), rank.numbers())


def test_a_state_before_any_update_is_saved_and_loaded(start: tuple) -> None:
    assert run_mesh(_save_without_updates, start, **TWO) == [([], [])] * 2


def _save_four(mesh: Mesh, start: tuple) -> list[Any]:
    rank = Rank(mesh, start, keep_last=1, keep_best=1)
    completed = []
    for version, score in ((10, 0.5), (20, 0.9), (30, None), (40, 0.7)):
        rank.checkpoints.save(rank.policy, state(version))  # waits for the one before
        completed.append(rank.checkpoints.poll())
        if score is not None:
            rank.checkpoints.note_score(version, score)
    completed.append(rank.checkpoints.finish())
    return sorted(version for versions in completed for version in versions)


def test_the_newest_and_the_best_stay(start: tuple) -> None:
    assert run_mesh(_save_four, start, **TWO) == [[10, 20, 30, 40]] * 2
    names = sorted(path.name for path in Path(start[1], CHECKPOINTS).iterdir())
    assert names == ["latest", "step-000020", "step-000040"]
    manifest = read_latest(start[1])
    assert manifest is not None
    assert manifest == msgspec.structs.replace(manifest, **msgspec.structs.asdict(state(40)), score=0.7)
    assert sorted(manifest.files) == [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json"]
    assert (manifest.run.seed, manifest.run.objective, manifest.run.dtype) == (0, "minpro", "float32")
    assert manifest.run.parallel["tensor"] == 2
    assert manifest.run.architecture["num_experts"] == 8


def _only_on_rank_1(mesh: Mesh, act: Callable[[], None]) -> Callable[[], None]:
    return act if mesh.rank == 1 else lambda: None


def _kill_the_writer(mesh: Mesh, checkpoints: Path) -> Any:
    return writing(_only_on_rank_1(mesh, lambda: os.kill(os.getpid(), signal.SIGKILL)))


@contextmanager
def _fill_the_disk_for_metadata(mesh: Mesh, checkpoints: Path) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    original = FileSystemWriterAsync.finish

    def finish(*arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 10, hard))
        original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriterAsync, "finish", finish)
        yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _refuse_processes(mesh: Mesh, checkpoints: Path) -> Iterator[None]:
    from torch import multiprocessing as torch_multiprocessing

    def start(self: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    with pytest.MonkeyPatch.context() as patch:
        if mesh.rank == 1:
            patch.setattr(torch_multiprocessing.get_context("fork").Process, "start", start)
        yield


FAILURES = {
    _kill_the_writer: "rank 1: the process that wrote ended with status -9 before it was done",
    fill_the_disk: "__1_0.distcp: [Errno 27] File too large",
    _fill_the_disk_for_metadata: "[Errno 27] File too large",
    _refuse_processes: "rank 1: the process that writes cannot be started: [Errno 12] Cannot allocate memory",
}


def _save_in_each_trouble(mesh: Mesh, start: tuple) -> list[dict[str, Any]]:
    """For every trouble a save that fails and one that training has waited for."""
    import logging

    logging.getLogger("minpro_megatron").addHandler(logging.FileHandler(f"{start[1]}/log-{mesh.rank}"))
    rank, found = Rank(mesh, start, keep_last=10), []
    checkpoints = rank.run_dir / CHECKPOINTS
    rank.checkpoints.save(rank.policy, state(10))
    assert rank.checkpoints.finish() == [10]
    for failing, trouble in zip(range(20, 100, 20), FAILURES, strict=True):
        with trouble(mesh, checkpoints):
            rank.checkpoints.save(rank.policy, state(failing))
            completed = [rank.checkpoints.finish()]
        at = [rank.latest()]
        names = rank.on_rank_0(lambda: {path.name for path in checkpoints.iterdir()})
        rank.checkpoints.save(rank.policy, state(failing + 10))
        completed.append(rank.checkpoints.poll())
        at.append(rank.latest())
        found.append({"completed": completed, "latest": at, "names": names})
    rank.checkpoints.save(rank.policy, state(100))
    assert rank.checkpoints.finish() == [100]
    return found


def test_a_save_that_fails_leaves_the_former_one_and_the_next_succeeds(start: tuple) -> None:
    failing = range(20, 20 + 20 * len(FAILURES), 20)
    for found in run_mesh(_save_in_each_trouble, start, **TWO):
        for version, one in zip(failing, found, strict=True):
            assert one["completed"] == [[], [version + 10]]
            assert one["latest"] == [version - 10, version + 10]
            assert one["names"] == {"latest", *(f"step-{former:06d}" for former in range(10, version, 20))}
    said = Path(start[1], "log-0").read_text().splitlines()
    for version, reason, line in zip(failing, FAILURES.values(), said, strict=True):
        assert line.startswith(f"the checkpoint of policy version {version} was not written: ")
        assert reason in line
        assert "The one before it is intact; training will wait for the next one to be written" in line
    assert Path(start[1], "log-1").read_text() == ""


def _save_on_a_full_disk(mesh: Mesh, start: tuple) -> tuple[str, int | None]:
    from minpro_megatron.checkpoints.shard_writing import SaveError

    rank = Rank(mesh, start)
    rank.checkpoints.save(rank.policy, state(10))
    rank.checkpoints.finish()
    with fill_the_disk(mesh, rank.run_dir / CHECKPOINTS):
        rank.checkpoints.save(rank.policy, state(20))
        rank.checkpoints.finish()
        with pytest.raises(SaveError) as caught:
            rank.checkpoints.save(rank.policy, state(30))
    return str(caught.value), rank.latest()


def test_the_second_failure_in_a_row_ends_the_run_on_all_ranks(start: tuple) -> None:
    for message, latest in run_mesh(_save_on_a_full_disk, start, **TWO):
        assert message.startswith("the checkpoint of policy version 30 was not written: rank 1: ")
        assert message.endswith(f"2 in a row: free some space in {start[1]}/checkpoints and launch again")
        assert latest == 10


def _save_once(mesh: Mesh, start: tuple) -> None:
    rank = Rank(mesh, start)
    rank.checkpoints.save(rank.policy, state(10))
    rank.checkpoints.finish()


def _load(mesh: Mesh, start: tuple, config: RunConfig, damaged: Sequence[Path | None] = (None,)) -> list[str]:
    """ "loaded", or the error of an attempt to load the newest checkpoint: for each of `damaged`, with a flipped bit in
    that file, or in none."""
    rank, found = Rank(mesh, start, config), []
    for path in damaged:
        rank.on_rank_0(lambda path=path: path and flip(path))
        try:
            rank.load_latest()
            found.append("loaded")
        except ValueError as error:
            found.append(str(error))
        torch.distributed.barrier()  # the other rank may still read
        rank.on_rank_0(lambda path=path: path and flip(path))
    return found


def test_what_does_not_fit_is_refused_on_all_ranks(start: tuple, model: tuple[str, list], tmp_path: Path) -> None:
    run_mesh(_save_once, start, **TWO)
    shard = tmp_path / CHECKPOINTS / "step-000010" / "__1_0.distcp"
    for whole, refusal in run_mesh(_load, start, CONFIG, [None, shard], **TWO):
        assert whole == "loaded"
        assert "__1_0.distcp: its SHA-256 is not the one in manifest.json; there is no other intact" in refusal
    for (refusal,) in run_mesh(_load, start, CONFIG.model_copy(update={"seed": 5}), **TWO):
        assert "seed = 0, but this run has 5" in refusal
    dense = tmp_path / "dense"
    make_model("dense").save_pretrained(dense)
    dense_config = step_config({"tensor": 2}, row_tokens=128)
    for (refusal,) in run_mesh(_load, (str(dense), *start[1:]), dense_config, tensor=2):
        assert "expert_ffn_hidden_size = 16, but this run has 0" in refusal


def _save_three(mesh: Mesh, start: tuple) -> None:
    rank = Rank(mesh, start, keep_last=3)
    for version in (10, 20, 30):
        rank.checkpoints.save(rank.policy, state(version))
        rank.checkpoints.finish()


@pytest.mark.parametrize("also_damaged", long_after(1, [True, False]))
def test_a_flipped_bit_in_any_file_is_refused_with_the_newest_intact_checkpoint(
    start: tuple, tmp_path: Path, also_damaged: bool
) -> None:
    run_mesh(_save_three, start, **TWO)
    folder = tmp_path / CHECKPOINTS / "step-000030"
    names = sorted(path.name for path in folder.iterdir() if path.name != "manifest.json")  # read before the ranks load
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json"]
    if also_damaged:
        flip(tmp_path / CHECKPOINTS / "step-000020" / "__0_0.distcp")
    intact = "step-000010" if also_damaged else "step-000020"
    damaged = [folder / name for name in names[: 1 if also_damaged else None]]
    for errors in run_mesh(_load, start, CONFIG, [*damaged, None], **TWO):
        assert errors.pop() == "loaded"
        assert errors == [
            f"{path}: its SHA-256 is not the one in manifest.json; {intact} is intact: write this name "
            f"into {tmp_path / CHECKPOINTS / 'latest'} to resume from it"
            for path in damaged
        ]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _save_other_weights(mesh: Mesh, start: tuple) -> None:
    rank = Rank(mesh, start)
    rank.policy.take_snapshot("sampling")
    with rank.policy.use_snapshot("sampling"), pytest.raises(AssertionError, match="'sampling' weights are swapped in"):
        rank.checkpoints.save(rank.policy, state(10))


def test_other_weights_than_the_current_ones_are_not_saved(start: tuple) -> None:
    run_mesh(_save_other_weights, start, **TWO)


def _load_edited(mesh: Mesh, start: tuple, edits: list[dict[str, int | None]]) -> list[str]:
    """What each edit of the manifest makes of its checkpoint, which was saved after three updates, one of them
    skipped: an error, or the number of updates that the optimizer has made."""
    rank = Rank(mesh, start)
    rank.update(2)
    saved = TrainerState(policy_version=1, updates=3, skipped_updates=1)
    rank.checkpoints.save(rank.policy, saved)
    rank.checkpoints.finish()
    path = rank.run_dir / CHECKPOINTS / "step-000001" / "manifest.json"
    # without its digest, as earlier versions wrote it: an edit would be refused as damage before it is compared
    whole = json.loads(rank.on_rank_0(path.read_text))
    del whole["digest"]
    found = []
    for edit in edits:
        rank.on_rank_0(lambda edit=edit: path.write_text(json.dumps(whole | edit)))
        manifest = rank.on_rank_0(lambda: read_latest(rank.run_dir))
        assert manifest is not None
        try:
            found.append(str(rank.checkpoints.load(rank.policy, manifest)))
        except UserError as error:
            found.append(str(error))
    return found


def test_a_manifest_whose_updates_are_not_the_optimizers_is_refused(start: tuple) -> None:
    edits = [{}, {"updates": 4}, {"updates": 2}, {"skipped_updates": 0}]
    of_an_earlier_version = [{"skipped_updates": None}, {"skipped_updates": None, "updates": 1}]
    found = run_mesh(_load_edited, start, [*edits, *of_an_earlier_version], **TWO)
    path = f"{start[1]}/checkpoints/step-000001/manifest.json"
    for whole, more, fewer, none_skipped, unknown, too_few in found:
        assert (whole, unknown) == ("2", "2")
        stated = "but the optimizer's state in this checkpoint has made 2: the manifest was changed"
        assert more.startswith(f"{path}: updates = 4 (skipped_updates = 1 of them), {stated}")
        assert fewer.startswith(f"{path}: updates = 2 (skipped_updates = 1 of them), {stated}")
        assert none_skipped.startswith(f"{path}: updates = 3, {stated}")
        assert too_few.startswith(f"{path}: updates = 1, {stated}")
        assert more.endswith(f"or write the name of another checkpoint into {start[1]}/checkpoints/latest")
