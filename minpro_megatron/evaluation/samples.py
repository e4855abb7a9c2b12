"""The samples of an evaluation on disk: one line a group of responses, so that an interrupted evaluation goes on."""

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

SETTINGS_FILE, SAMPLES_FILE = "settings.json", "samples.jsonl"
MAX_COMPARED_CHARS = 200


class SampledResponse(msgspec.Struct, frozen=True):
    """One response as it was graded: `extracted` is what of it was compared, `problem` why it could not be graded."""

    text: str
    num_tokens: int
    finish_reason: str  # "stop" or "length"
    reward: float | None  # None: it could not be graded
    extracted: str | None = None
    problem: str | None = None


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
    """As much as figures need: nothing where an answer was extracted, of a long text a digest that equal ones share."""
    if response.extracted is not None:
        return ""
    if len(response.text) <= MAX_COMPARED_CHARS:
        return response.text
    return blake2b(response.text.encode(), digest_size=16).hexdigest()


class SampleFile:
    """`folder/samples.jsonl`, held by one process at a time; use inside `with`.

    The folder belongs to the settings it was begun with. Raises ValueError if they differ, if another process writes,
    and for a folder with files of something else.
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
        """A process that was killed in a write leaves a line without an end."""
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
        """Adds a line in one write: what is there after a crash is whole lines and at most one torn at the end."""
        line = msgspec.json.encode(group) + b"\n"
        written = os.write(self._file.fileno(), line)
        if written != len(line):
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes were written; is the disk full?")

    def groups(self, text_of: Callable[[SampledResponse], str]) -> Iterator[SampledGroup]:
        """Everything sampled so far, a group sampled twice once. Raises ValueError for a damaged line.

        `text_of` gives what is kept of a response's text: all texts of an evaluation are gigabytes.
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
    """An evaluation begins with both files; everything that it writes later replaces files of the same name."""
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
    if is_empty:  # nothing is lost
        replace_file(path, json.dumps(wanted, indent=2) + "\n")
    elif found != wanted:
        raise UserError(
            f"{folder} holds samples of other settings ({'; '.join(_differences(found or {}, wanted))}): "
            "give the settings of then, or another --output"
        )


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted(found.keys() | wanted.keys()):
        then, now = found.get(name), wanted.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            yield from _differences(then, now, f"{prefix}{name}.")
        elif then != now:
            yield f"{prefix}{name}: {then!r} -> {now!r}"
