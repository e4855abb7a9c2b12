"""The folder of a run's checkpoints, written by one process. Checkpoints appear in it, and are removed from it,
atomically.

A checkpoint is written under a unique hidden name, renamed when it is complete, and only then named by `latest`. If
the process dies at any moment, `latest` names a complete checkpoint: the previous or the new one.
"""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from minpro_megatron.checkpoints.manifest import MANIFEST, RunManifest, folder_name, to_json
from minpro_megatron.checkpoints.resume_point import LATEST, complete_manifests, read_latest_in, version_of
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.errors import RunFailed
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.records import EvaluationResult

log = logging.getLogger(__name__)

# ".step-000010.4f2a91c0.partial": being written; ".removed": being removed
_OURS_HIDDEN = re.compile(r"\.(step-\d{6,}\.[0-9a-f]{8}\.(partial|removed)|latest\.\d+\.tmp)")


def superseded(scores: Mapping[int, float | None], keep_last: int, keep_best: int) -> set[int]:
    """The checkpoints of `{version: its score, if known}` that need not be kept: all except the newest and the best (of
    equal scores, the newer)."""
    newest = sorted(scores)[-keep_last:]
    by_score = sorted((score, version) for version, score in scores.items() if score is not None)
    best = [version for _, version in by_score[-keep_best:]] if keep_best else []
    return set(scores) - {*newest, *best}


def score_of(result: EvaluationResult, settings: CheckpointConfig) -> float:
    """The score that ranks the checkpoint of the evaluated version: higher is better."""
    return result.pass_at_1 if settings.keep_best_by == "accuracy" else result.mean_reward


class CheckpointFolder:
    """Used by one process of the run at a time. Methods raise OSError for errors of the file system, and what
    `may_write` raises before they change the folder."""

    def __init__(self, path: Path, settings: CheckpointConfig, may_write: Callable[[], None] = lambda: None) -> None:
        """Removes the unfinished checkpoints of a killed process. Raises UserError as read_latest does. `may_write`
        raises once another process owns the folder."""
        self._may_write = may_write
        may_write()
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._settings = settings
        for entry in path.iterdir():
            if _OURS_HIDDEN.fullmatch(entry.name):
                _remove(entry)
        latest = read_latest_in(path)
        self._latest = latest.policy_version if latest else None
        found = {manifest.policy_version: manifest for manifest in complete_manifests(path)}
        # Checkpoints newer than the one that the run resumes from belong to an abandoned continuation. They are removed
        # once this continuation has saved a checkpoint.
        self._given_up = {version for version in found if self._latest is None or version > self._latest}
        self._kept = {version: found[version] for version in found.keys() - self._given_up}
        self._scores: dict[int, float] = {}

    def new_partial(self, version: int) -> Path:
        """A new empty folder to write a checkpoint into. Its name is unique: a writer that survived its killed rank may
        still be writing into an older one."""
        assert self._latest is None or version > self._latest, f"version {version} after {self._latest}"
        partial = self._hidden(version, "partial")
        partial.mkdir()
        return partial

    def publish(self, partial: Path, manifest: RunManifest) -> None:
        """Makes `partial`, whose files are written, the checkpoint that the run resumes from; removes old ones."""
        self._may_write()
        version = manifest.policy_version
        if version in self._scores:
            manifest = msgspec.structs.replace(manifest, score=self._scores[version])
        replace_file(partial / MANIFEST, to_json(manifest))
        _sync_folder(partial)
        final = self._path / folder_name(version)
        self._remove(version)
        partial.rename(final)
        _sync_folder(self._path)
        self._may_write()
        replace_file(self._path / LATEST, final.name + "\n")
        self._latest = version
        self._kept[version] = manifest
        try:
            _sync_folder(self._path)
            self._may_write()
            self._remove_superseded()
        except OSError as error:  # not a failure of this checkpoint, which is complete
            log.warning("%s: %s", self._path, error)

    def discard(self, partial: Path) -> None:
        """Remove a checkpoint that failed, under its hidden or its final name. Raises nothing: what cannot be removed
        now is removed at the next start."""
        version = version_of(partial.name.split(".")[1])
        assert version is not None, partial
        try:
            _remove(partial)
            self._may_write()
            self._remove(version)
        except (OSError, RunFailed) as error:
            log.warning("%s: %s", partial, error)

    def note_score(self, version: int, score: float) -> None:
        """Store the score with the checkpoint of that version, if there is or will be one."""
        self._scores[version] = score
        if version in self._kept and self._kept[version].score != score:  # reported again after every publication
            self._may_write()
            manifest = msgspec.structs.replace(self._kept[version], score=score)
            replace_file(self._path / folder_name(version) / MANIFEST, to_json(manifest))
            self._kept[version] = manifest

    def _remove_superseded(self) -> None:
        for version in sorted(self._given_up - self._kept.keys()):
            log.warning(
                "%s: removed, because the run was resumed from an earlier one", self._path / folder_name(version)
            )
            self._remove(version)
        self._given_up = set()
        scores = {version: manifest.score for version, manifest in self._kept.items()}
        for version in superseded(scores, self._settings.keep_last, self._settings.keep_best):
            self._remove(version)
            del self._kept[version]

    def _remove(self, version: int) -> None:
        folder, hidden = self._path / folder_name(version), self._hidden(version, "removed")
        if folder.exists():
            folder.rename(hidden)  # first, so that no partly removed checkpoint is visible
            _remove(hidden)

    def _hidden(self, version: int, state: str) -> Path:
        return self._path / f".{folder_name(version)}.{secrets.token_hex(4)}.{state}"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Syncs the folder, so that the names in it survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
