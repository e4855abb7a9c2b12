"""The files of a data set, on disk or on the Hugging Face hub, and their rows one after the other."""

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from minpro_megatron.errors import UserError
from tools.prompt_sets.rows import DamagedRow, read_jsonl

SUFFIXES = (".parquet", ".jsonl")
# What is in memory of a file: rows as Python objects, and the part of each column that is read at once.
BATCH_ROWS = 4096
READ_BYTES = 1024**2

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<pattern>.+))?")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")


def find_files(given: str, revision: str | None = None) -> list[Path]:
    """The data files that `given` names: a file, a folder, or a hub id, which is downloaded (into the hub's cache).

    A folder or hub id with several data sets needs a pattern: `openai/gsm8k:main/test-*.parquet`. Raises ValueError or
    FileNotFoundError saying what there is.
    """
    folder, _, pattern = given.partition(":")
    if Path(given).is_file():
        return [Path(given)]
    if Path(folder).is_dir():
        names = [path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()]
        return [Path(folder) / name for name in choose_files(names, pattern, given)]
    match = _HUB_ID.fullmatch(given)
    if match is None or (given.endswith(SUFFIXES) and not pattern):
        raise FileNotFoundError(f"--input {given}: no such file; give a file, a folder or a hub id such as owner/name")
    return _from_hub(match["repository"], match["pattern"] or "", revision)


def choose_files(names: Iterable[str], pattern: str, given: str) -> list[str]:
    """Those of `names` that are data and match `pattern`, sorted; without a pattern the only ones (shards are one).

    Raises ValueError if there are none, or several that are not shards of one.
    """
    data = sorted(name for name in names if name.endswith(SUFFIXES))
    chosen = [name for name in data if not pattern or fnmatch(name, pattern)]
    if not chosen:
        found = ", ".join(data[:12]) or f"nothing that ends with {' or '.join(SUFFIXES)}"
        raise UserError(f"--input {given}: no data file matches; there is {found}")
    if not pattern and len({_SHARD.sub("", name) for name in chosen}) > 1:
        raise UserError(
            f"--input {given}: several data sets; name one with a pattern, such as {given}:{chosen[0]}; there are "
            f"{', '.join(chosen[:12])}"
        )
    return chosen


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
        raise FileNotFoundError(
            f"--input {given}: neither a file here, nor did it come from the hub ({' '.join(str(error).split())}); "
            "download it and give the file"
        ) from None


def count_rows(path: Path) -> int | None:
    """The rows of a parquet file, which states them; None for JSON Lines. Raises ValueError for a damaged file."""
    if path.suffix != ".parquet":
        return None
    with _open_parquet(path) as file:
        return file.metadata.num_rows


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every `(row number from 1, row)`, in memory that does not grow with the file.

    Of parquet only those of `columns` that the file has are read. Raises ValueError for a damaged file, DamagedRow for
    a damaged row of JSON Lines.
    """
    if path.suffix != ".parquet":
        yield from read_jsonl(path)
        return
    import pyarrow

    number = 0
    with _open_parquet(path) as file:
        present = [name for name in file.schema_arrow.names if name in columns]
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=present, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedRow(
                path, number + 1, "(whole row)", f"cannot be read ({error}); is the file cut off?"
            ) from error


def _open_parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file ({error}); download it again") from error
