"""Reads what the package wandb stores of a run: records in the format of LevelDB's log, each a protobuf message."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FILE_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, struct.Struct("<IHB")  # checksum, length, kind
_WHOLE, _LAST = 1, 4


def stored_records(path: Path) -> Iterator[Any]:
    """The `Record` messages in a `.wandb` file."""
    from wandb.proto import wandb_internal_pb2

    protocol: Any = wandb_internal_pb2
    data, place, content = path.read_bytes(), _FILE_HEADER, b""
    while place + _RECORD_HEADER.size <= len(data):
        if (left := _BLOCK - place % _BLOCK) < _RECORD_HEADER.size:
            place += left
            continue
        _, length, kind = _RECORD_HEADER.unpack_from(data, place)
        place += _RECORD_HEADER.size
        content += data[place : place + length]
        place += length
        if kind in (_WHOLE, _LAST):
            yield protocol.Record.FromString(content)
            content = b""


def stored_run(path: Path) -> Any:
    """The message that describes the run."""
    return next(record.run for record in stored_records(path) if record.WhichOneof("record_type") == "run")


def stored_history(path: Path) -> list[dict[str, Any]]:
    """What was logged: one dict for each call, without the entries that the package adds itself."""
    found = []
    for record in stored_records(path):
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            found.append({name: value for name, value in values.items() if not name.startswith("_")})
    return found
