"""The files in the work folder through which the starting process and the ranks of a replay communicate."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from minpro_megatron.config.run import RunConfig
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.records import Record, decode, encode
from minpro_megatron.replay.rollouts import Rollout

RESULT = "result"  # the folder in it that becomes the output
SUMMARY, TOKENS, MODEL = "summary.json", "tokens.jsonl", "model"
_SETTINGS, _ROWS, _PROGRESS, _ERROR = "run.json", "rows.msgpack", "progress.json", "error.txt"


class ReplayRows(Record, frozen=True, kw_only=True):
    """The rows of the file, and how they are replayed."""

    rollouts: list[Rollout]
    groups_per_batch: int | None  # None: all groups in one mini-batch
    updates: int


def write_job(folder: Path, config: RunConfig, rows: ReplayRows) -> None:
    (folder / _SETTINGS).write_text(config.to_json(), encoding="utf-8")
    (folder / _ROWS).write_bytes(encode(rows))


def read_job(folder: Path) -> tuple[RunConfig, ReplayRows]:
    config = RunConfig.from_json((folder / _SETTINGS).read_text(encoding="utf-8"))
    return config, decode(ReplayRows, (folder / _ROWS).read_bytes())


@dataclass(frozen=True)
class ReplayProgress:
    """The progress of the ranks, in tokens; every pass over a mini-batch counts."""

    phase: str = "starting the ranks"
    done: int = 0
    total: int | None = None


def write_progress(folder: Path, progress: ReplayProgress) -> None:
    replace_file(folder / _PROGRESS, json.dumps(vars(progress)))


def read_progress(folder: Path) -> ReplayProgress:
    try:
        return ReplayProgress(**json.loads((folder / _PROGRESS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return ReplayProgress()


def state_error(folder: Path, error: Exception) -> None:
    """Writes the reason for the end of the replay. If several ranks write one, the first one is kept."""
    try:
        file = os.open(folder / _ERROR, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return
    with open(file, "w", encoding="utf-8") as text:
        text.write(str(error))


def stated_error(folder: Path) -> str | None:
    file = folder / _ERROR
    return file.read_text(encoding="utf-8") if file.exists() else None
