"""The run's checkpoints: a save starts between two global steps and finishes while training continues; any mesh can
load it.

If a save fails, the run can still be resumed from the previous checkpoint. The failure is logged, and the next save is
not made in the background. If that fails too, the run ends.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import msgspec

from minpro_megatron.checkpoints.checkpoint_folder import CheckpointFolder
from minpro_megatron.checkpoints.converted_model import refuse_code_on_all_ranks
from minpro_megatron.checkpoints.file_records import record_file
from minpro_megatron.checkpoints.manifest import (
    MANIFEST,
    FileRecord,
    RunIdentity,
    RunManifest,
    TrainerState,
    folder_name,
)
from minpro_megatron.checkpoints.resume_point import LATEST, complete_manifests, refuse_other_run
from minpro_megatron.checkpoints.shard_writing import SaveError, ShardWrite, on_rank_0
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.errors import UserError
from minpro_megatron.parallel.mesh import Mesh

log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 2  # in a row


class Trainable(Protocol):
    """The object that a checkpoint saves: the trainer's policy."""

    @property
    def identity(self) -> RunIdentity: ...

    def save(self, folder: Path, in_background: bool = False) -> ShardWrite: ...

    def load(self, folder: Path) -> int: ...


@dataclass(frozen=True)
class _Save:
    """A save that has not ended yet."""

    write: ShardWrite
    partial: Path
    state: TrainerState
    run: RunIdentity
    began: float  # Unix time


class RunCheckpoints:
    """Every method is collective except `note_score`, in which only rank 0 does something."""

    def __init__(
        self, path: Path, settings: CheckpointConfig, mesh: Mesh, may_write: Callable[[], None] = lambda: None
    ) -> None:
        """`path` is the run's folder for checkpoints; unfinished checkpoints of a killed run are removed from it.
        Rank 0 calls `may_write` before each change of the folder: it raises RunFailed once this process may not change
        it.

        Raises UserError if the checkpoint that `latest` names is damaged, SaveError if the folder cannot be used."""
        self._path = path
        self._settings = settings
        self._mesh = mesh
        self._folder: CheckpointFolder | None = None  # on rank 0
        self._under_way: _Save | None = None
        self._completed: list[int] = []  # and not yet returned by `poll`
        self._failed_in_a_row = 0
        self.last_save_s = 0.0  # on rank 0: seconds from the start of the last complete save until it was written

        def open_folder() -> None:
            self._folder = CheckpointFolder(path, settings, may_write)

        on_rank_0(mesh, open_folder)

    def save(self, policy: Trainable, state: TrainerState) -> None:
        """Start a save; the weights may change again once this returns. Waits first for a save in progress.

        Raises SaveError on all ranks when two saves in a row have failed.
        """
        self._settle(wait=True)
        began = time.time()
        try:
            partial = self._in_folder(lambda folder: folder.new_partial(state.policy_version))
        except SaveError as error:
            self._count_failure(state.policy_version, error)
            return
        in_background = self._settings.asynchronous and not self._failed_in_a_row
        write = policy.save(partial, in_background)
        self._under_way = _Save(write, partial, state, policy.identity, began)
        if not in_background:
            self._settle(wait=True)

    def poll(self) -> list[int]:
        """Complete the save in progress if all ranks have written. Returns the policy versions whose checkpoints became
        the latest since the last call. Raises as `save` does."""
        self._settle(wait=False)
        completed, self._completed = self._completed, []
        return completed

    def finish(self) -> list[int]:
        """`poll`, after waiting for the save in progress."""
        self._settle(wait=True)
        return self.poll()

    def note_score(self, version: int, score: float) -> None:
        """Records the evaluation of a version, which decides from the next save on which checkpoints are the best."""
        if self._folder is None:
            return
        try:
            self._folder.note_score(version, score)
        except OSError as error:
            log.warning("the score of %s is not stored with it: %s", folder_name(version), error)

    def load(self, policy: Trainable, manifest: RunManifest) -> int:
        """Load weights and optimizer state from the checkpoint of `manifest`, which is the same on all ranks. Returns
        how many of its updates the optimizer has made; the others were skipped.

        Raises UserError on all ranks if the checkpoint belongs to another run, if the manifest does not match the
        optimizer's state, or if a file has changed since it was written. In the last case the error names the newest
        older checkpoint without such a file. The run does not resume from that automatically: the collector has already
        restored the journal to this checkpoint, and steps would be trained again.
        """
        folder = self._path / manifest.folder_name
        refuse_other_run(folder, manifest.run, policy.identity)
        if damage := self._damage_in(manifest):
            raise UserError(f"{damage}; {self._remedy(manifest.policy_version)}")
        refuse_code_on_all_ranks(folder, self._mesh)
        steps = policy.load(folder)
        _refuse_other_updates(folder / MANIFEST, manifest, steps)
        return steps

    def _settle(self, wait: bool) -> None:
        save = self._under_way
        if save is None or not save.write.is_done(wait):
            return
        self._under_way = None
        try:
            seconds = _seconds(save) if self._folder is not None else 0.0
            manifest = _manifest(save, save.write.complete())
            self._in_folder(lambda folder: folder.publish(save.partial, manifest))
        except SaveError as error:
            if self._folder is not None:
                self._folder.discard(save.partial)
            self._count_failure(save.state.policy_version, error)
            return
        self._failed_in_a_row, self.last_save_s = 0, seconds
        self._completed.append(save.state.policy_version)

    def _in_folder[T](self, action: Callable[[CheckpointFolder], T]) -> T:
        def act() -> T:
            assert self._folder is not None, "rank 0 has the folder"
            return action(self._folder)

        return on_rank_0(self._mesh, act)

    def _count_failure(self, version: int, error: SaveError) -> None:
        self._failed_in_a_row += 1
        what = f"the checkpoint of policy version {version} was not written: {error}. The one before it is intact"
        if self._failed_in_a_row >= MAX_FAILED_SAVES:
            raise SaveError(
                f"{what}. {self._failed_in_a_row} in a row: free some space in {self._path} and launch again"
            )
        if self._mesh.rank == 0:
            log.warning("%s; training will wait for the next one to be written", what)

    def _damage_in(self, manifest: RunManifest) -> str | None:
        """The error of the first file that has changed since it was written; None if no file has. Every rank reads its
        share of the files, about as many bytes as it will load."""
        folder = self._path / manifest.folder_name
        own = sorted(manifest.files)[self._mesh.rank :: self._mesh.control.size()]
        errors = self._mesh.from_all_ranks([_damage(folder / name, manifest.files[name]) for name in own])
        return next((error for of_rank in errors for error in of_rank if error), None)

    def _remedy(self, damaged_version: int) -> str:
        """What the user can do instead of resuming from the damaged checkpoint. Reads the older checkpoints completely,
        newest first, until one is intact."""
        older = [m for m in complete_manifests(self._path) if m.policy_version < damaged_version]
        older.sort(key=lambda manifest: -manifest.policy_version)
        for manifest in self._mesh.from_rank_0(older if self._mesh.rank == 0 else None):
            if self._damage_in(manifest) is None:
                return f"{manifest.folder_name} is intact: write this name into {self._path / LATEST} to resume from it"
        return f"there is no other intact checkpoint in {self._path}: give another run name, or restore the file"


def _refuse_other_updates(path: Path, manifest: RunManifest, steps: int) -> None:
    """Raises UserError if the updates in the manifest differ from those of the optimizer's state: seeds and counts of
    the run would continue from the wrong update."""
    skipped = manifest.skipped_updates
    if steps == manifest.updates - skipped if skipped is not None else steps <= manifest.updates:
        return
    less = f" (skipped_updates = {skipped} of them)" if skipped else ""
    raise UserError(
        f"{path}: updates = {manifest.updates}{less}, but the optimizer's state in this checkpoint has made {steps}: "
        "the manifest was changed or belongs to another checkpoint; restore it, or write the name of another "
        f"checkpoint into {path.parent.parent / LATEST}"
    )


def _manifest(save: _Save, files: dict[str, FileRecord]) -> RunManifest:
    return RunManifest(
        **msgspec.structs.asdict(save.state),
        run=save.run,
        created=datetime.now(UTC),
        files=dict(sorted(files.items())),
    )


def _seconds(save: _Save) -> float:
    """From the start of the save until its last shard was written. The trainer polls only between two steps, which is
    often later."""
    written = max((path.stat().st_mtime for path in save.partial.rglob("*")), default=save.began)
    return max(0.0, written - save.began)


def _damage(path: Path, written: FileRecord) -> str | None:
    try:
        found = record_file(path)
    except OSError as error:
        return str(error)
    return None if found == written else f"{path}: its SHA-256 is not the one in {MANIFEST}"
