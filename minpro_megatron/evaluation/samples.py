"""The samples of an evaluation on disk, one line per group, so that an interrupted evaluation can be resumed."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.records import Turn

SETTINGS_FILE, SAMPLES_FILE = "settings.json", "samples.jsonl"
MAX_COMPARED_CHARS = 200


class SampledResponse(msgspec.Struct, frozen=True):
    """A graded response: `extracted` is the part that was compared, `problem` is why it could not be graded."""

    text: str
    num_tokens: int
    finish_reason: str  # "stop" or "length"
    reward: float | None  # None: it could not be graded
    extracted: str | None = None
    problem: str | None = None
    turns: list[Turn] = []  # of an episode


class SampledGroup(msgspec.Struct, frozen=True):
    """Samples `first_sample`, `first_sample + 1`, ... of a prompt, all of one policy version."""

    benchmark: str
    policy_version: int
    prompt_id: str
    first_sample: int
    responses: list[SampledResponse]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.benchmark, self.prompt_id, self.first_sample


def whole_text(response: SampledResponse) -> str:
    return response.text


def text_to_compare(response: SampledResponse) -> str:
    """The text needed for scores: empty if an answer was extracted; for a long text a digest, equal for equal texts."""
    if response.extracted is not None:
        return ""
    if len(response.text) <= MAX_COMPARED_CHARS:
        return response.text
    return blake2b(response.text.encode(), digest_size=16).hexdigest()


class SampleFile:
    """`folder/samples.jsonl`, opened by one process at a time; use inside `with`.

    The folder belongs to the settings with which it was created. Raises UserError if they differ, if another process
    writes to it, and if the folder has files of something else.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / SAMPLES_FILE
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _check_settings(folder, settings, is_empty=self.path.stat().st_size == 0)
            self._drop_torn_line()
        except BlockingIOError:
            self._file.close()
            raise UserError(f"{folder}: another evaluation writes here; give another --output, or wait") from None
        except BaseException:
            self._file.close()
            raise

    def _drop_torn_line(self) -> None:
        """Removes a line without an end, which a process leaves that was killed during a write."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            if line.endswith(b"\n"):
                end += len(line)
        self._file.truncate(end)

    def __enter__(self) -> "SampleFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, group: SampledGroup) -> None:
        """Adds a line in one write: a crash leaves complete lines and at most one incomplete line at the end."""
        line = msgspec.json.encode(group) + b"\n"
        written = os.write(self._file.fileno(), line)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written; is the disk full?")

    def groups(self, text_of: Callable[[SampledResponse], str]) -> Iterator[SampledGroup]:
        """All groups sampled so far; a group that was sampled twice is returned once. Raises UserError for a damaged
        line.

        `text_of` returns the text to keep of a response, because all texts of an evaluation take gigabytes.
        """
        seen = set()
        self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            try:
                group = msgspec.json.decode(line, type=SampledGroup)
            except (msgspec.DecodeError, RecursionError) as error:  # also rows that are nested too deeply
                raise UserError(f"{self.path}, line {number}: {error}; remove the line to sample it again") from None
            if group.key not in seen:
                seen.add(group.key)
                responses = [msgspec.structs.replace(found, text=text_of(found)) for found in group.responses]
                yield msgspec.structs.replace(group, responses=responses)


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError for other files: an evaluation starts with both files, and later replaces files it wrote."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder}: this is a file; give another --output")
    names = {path.name for path in folder.iterdir()}
    begun = SETTINGS_FILE in names and SAMPLES_FILE in names
    samples = folder / SAMPLES_FILE
    if names and not begun and not (names == {SAMPLES_FILE} and samples.is_file() and samples.stat().st_size == 0):
        raise UserError(
            f"{folder}: it holds files that no evaluation wrote ({', '.join(sorted(names)[:3])}); give another --output"
        )


def _check_settings(folder: Path, settings: Mapping[str, Any], is_empty: bool) -> None:
    path, wanted = folder / SETTINGS_FILE, json.loads(json.dumps(settings))
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found = None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); give another --output") from None
    if (found is not None and not isinstance(found, dict)) or (is_empty and found and found.keys() != wanted.keys()):
        raise UserError(f"{path}: these are not the settings of an evaluation; give another --output")
    if is_empty:  # no samples would be lost
        replace_file(path, json.dumps(wanted, indent=2) + "\n")
    elif found != wanted:
        raise UserError(
            f"{folder} holds samples of other settings ({'; '.join(_differences(found or {}, wanted))}): "
            "use the settings of those samples, or another --output"
        )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(found.keys() | wanted.keys()):
        then, now = found.get(name), wanted.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            yield from _differences(then, now, f"{prefix}{name}.")
        elif then != now:
            yield f"{prefix}{name}: {then!r} -> {now!r}"
