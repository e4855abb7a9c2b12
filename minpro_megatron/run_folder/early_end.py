"""Ends a start of a run before the run is complete: two files between the launcher and the trainer's rank 0.

run_dir/starts/<incarnation>/stop_request.json  the trainer is to save and end: the launcher got a signal, or
                                                `minpro cancel --save` was called
run_dir/starts/<incarnation>/early_end.json     the trainer has saved, or is about to save, and ends
"""

from pathlib import Path

import msgspec

from minpro_megatron.files.replacement import replace_file_in

STARTS = "starts"
STOP_REQUEST = "stop_request.json"
_EARLY_END = "early_end.json"


class StopRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The reason to stop the run, such as "SIGTERM"."""

    reason: str


class EarlyEnd(msgspec.Struct, frozen=True, kw_only=True):
    """The global step after which the start ends, and the reason; `saved`: the checkpoint of that step is complete."""

    policy_version: int
    reason: str
    saved: bool


def request_stop(run_dir: Path, incarnation: int, request: StopRequest) -> None:
    _write(run_dir, incarnation, STOP_REQUEST, request)


def read_stop_request(run_dir: Path, incarnation: int) -> StopRequest | None:
    return _read(run_dir, incarnation, STOP_REQUEST, StopRequest)


def write_early_end(run_dir: Path, incarnation: int, end: EarlyEnd) -> None:
    _write(run_dir, incarnation, _EARLY_END, end)


def read_early_end(run_dir: Path, incarnation: int) -> EarlyEnd | None:
    return _read(run_dir, incarnation, _EARLY_END, EarlyEnd)


def _write(run_dir: Path, incarnation: int, name: str, content: msgspec.Struct) -> None:
    replace_file_in(Path(run_dir), f"{STARTS}/{incarnation}/{name}", msgspec.json.encode(content).decode() + "\n")


def _read[T](run_dir: Path, incarnation: int, name: str, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode((_folder(run_dir, incarnation) / name).read_bytes(), type=kind)
    except FileNotFoundError:
        return None


def _folder(run_dir: Path, incarnation: int) -> Path:
    return Path(run_dir) / STARTS / str(incarnation)
