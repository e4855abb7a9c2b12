"""Rows of parquet files, streamed, with numbers as their writer saw them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minpro_megatron.errors import UserError
from minpro_megatron.prompt_sets.rows import DamagedRow

# The part of a file that is in memory: rows as Python objects, and the part of each column that is read at once.
BATCH_ROWS = 4096
READ_BYTES = 1024**2


def num_rows(path: Path) -> int:
    """Raises UserError for a damaged file."""
    with _open(path) as file:
        return file.metadata.num_rows


def column_names(path: Path) -> list[str]:
    """All columns of the file; those in structures have a dot: `reward_model.ground_truth`."""
    with _open(path) as file:
        return [name for field in file.schema_arrow for name in _names_in(field)]


def _names_in(field: Any) -> list[str]:
    import pyarrow

    if not pyarrow.types.is_struct(field.type):
        return [field.name]
    return [f"{field.name}.{name}" for inner in field.type for name in _names_in(inner)]


def read_parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every `(row number from 1, row)`; only those of `columns` that the file has are read (None: all).

    Raises UserError for a damaged file.
    """
    import pyarrow

    number = 0
    with _open(path) as file:
        present = [field for field in file.schema_arrow if columns is None or field.name in columns]
        readings = {field.name: reading for field in present if (reading := _reading(field.type)) is not None}
        try:
            for batch in file.iter_batches(
                batch_size=BATCH_ROWS, columns=[field.name for field in present], use_threads=False
            ):
                for row in batch.to_pylist():
                    number += 1
                    for name, reading in readings.items():
                        row[name] = reading(row[name])
                    yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedRow(
                path, number + 1, "(whole row)", f"cannot be read ({error}); is the file cut off?"
            ) from error


def _reading(kind: Any) -> Callable[[Any], Any] | None:
    """A function that restores the value its writer meant: 0.1 for 0.1 in 32 bits, where Python would have
    0.10000000149011612; a text for binary text. None if no conversion is needed."""
    import numpy
    from pyarrow import types

    if types.is_float32(kind) or types.is_float16(kind):
        narrow = numpy.float32 if types.is_float32(kind) else numpy.float16
        return lambda value: value if value is None else float(str(narrow(value)))
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
        return _decoded
    if types.is_dictionary(kind):
        return _reading(kind.value_type)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _reading(kind.value_type)
        return inner and (lambda value: value if value is None else [inner(part) for part in value])
    if types.is_struct(kind):
        fields = {field.name: reading for field in kind if (reading := _reading(field.type)) is not None}
        return (lambda value: _with_fields(value, fields)) if fields else None
    return None


def _decoded(value: bytes | None) -> str | bytes | None:
    try:
        return value if value is None else value.decode("utf-8")
    except UnicodeError:
        return value  # code that needs a text rejects it


def _with_fields(value: dict[str, Any] | None, fields: dict[str, Callable[[Any], Any]]) -> dict[str, Any] | None:
    return value if value is None else value | {name: reading(value[name]) for name, reading in fields.items()}


def _open(path: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a parquet file ({error}); download it again") from error
