"""The files of a data set, on disk or on the Hugging Face hub, and an iterator over their rows."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from minpro_megatron.errors import UserError
from minpro_megatron.prompt_sets import parquet_files, text_files
from minpro_megatron.prompt_sets.file_kinds import is_parquet
from minpro_megatron.prompt_sets.rows import MissingField, names_in

SUFFIXES = (".parquet", ".jsonl")
# Used if a folder has none of the others, because such files may also be descriptions of the data.
OTHER_SUFFIXES = (".json", *text_files.DELIMITERS)
_NO_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<pattern>.+))?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")


def find_files(given: str, revision: str | None = None) -> list[Path]:
    """The data files that `given` names: a file, a folder, or a hub id, which is downloaded (into the hub's cache).

    A folder or hub id with several data sets needs a pattern: `openai/gsm8k:main/test-*.parquet`. Raises UserError
    that lists the files.
    """
    folder, _, pattern = given.partition(":")
    if Path(given).is_file():
        return [Path(given)]
    if Path(folder).is_dir():
        names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
        return [Path(folder) / name for name in choose_files(names, pattern, given)]
    match = _HUB_ID.fullmatch(given)
    if match is None or (_has_suffix(given, SUFFIXES + OTHER_SUFFIXES) and not match["pattern"]):
        raise UserError(f"--input {given}: no such file; give a file, a folder or a hub id such as owner/name")
    return _from_hub(match["repository"], match["pattern"] or "", revision)


def choose_files(names: Iterable[str], pattern: str, given: str) -> list[str]:
    """The data files among `names` that match `pattern`, sorted; without a pattern there must be only one data set.

    Raises ValueError if there are none, or several that are not shards of one.
    """
    data = sorted(name for name in names if _has_suffix(name, SUFFIXES))
    others = sorted(name for name in names if _has_suffix(name, OTHER_SUFFIXES) and Path(name).name not in _NO_DATA)
    data = data + others if pattern else data or others
    chosen = [name for name in data if not pattern or fnmatch(name, pattern)]
    if not chosen:
        found = ", ".join(data[:12]) or f"nothing that ends with {' or '.join(SUFFIXES + OTHER_SUFFIXES)}"
        raise UserError(f"--input {given}: no data file matches; there is {found}")
    if not pattern and len({_SHARD.sub("", name) for name in chosen}) > 1:
        raise UserError(
            f"--input {given}: several data sets; name one with a pattern, such as {given}:{chosen[0]}; there are "
            f"{', '.join(chosen[:12])}"
        )
    return chosen


def _has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Also with a compression suffix after it: rows.jsonl.gz."""
    return text_files.without_compression(name).endswith(suffixes)


def _from_hub(repository: str, pattern: str, revision: str | None) -> list[Path]:
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    given = f"{repository}:{pattern}" if pattern else repository
    try:
        hub = HfApi()
        names = hub.list_repo_files(repository, repo_type="dataset", revision=revision)
        return [
            Path(hub.hf_hub_download(repository, name, repo_type="dataset", revision=revision))
            for name in choose_files(names, pattern, given)
        ]
    except (httpx.HTTPError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"--input {given}: not a file here, and the hub could not provide it ({' '.join(str(error).split())}); "
            "download it and give the file"
        ) from None


def count_rows(path: Path) -> int | None:
    """The rows of a parquet file, which stores the number; None for others. Raises UserError for a damaged file."""
    return parquet_files.num_rows(path) if is_parquet(path) else None


def read_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every `(row number from 1, row)`, in memory that does not grow with the file (except for a JSON array).

    From parquet only those of `columns` that the file has are read; None: all. Raises UserError for a damaged file or
    one of another kind, DamagedRow for a damaged row.
    """
    if is_parquet(path):
        yield from parquet_files.read_parquet_rows(path, columns)
    else:
        yield from text_files.read_text_rows(path)


def missing_field(path: Path, row_number: int, row: Mapping[str, Any], field: str) -> MissingField:
    """The error for a row without `field`, which lists all fields that the file has."""
    return MissingField(
        path, row_number, field, parquet_files.column_names(path) if is_parquet(path) else names_in(row)
    )
