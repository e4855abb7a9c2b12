"""What a run was begun with: digests of its data and model files, and which of them were replaced later."""

from pathlib import Path

import msgspec

from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file

FILE_NAME = "inputs.json"


class InputChange(msgspec.Struct, frozen=True):
    """Files that had another content when the run continued, with the user's consent."""

    global_step: int  # from which the run continued
    names: list[str]


class RunInputs(msgspec.Struct, frozen=True):
    """SHA-256 of each input by name, such as `data.train_file` or `model.hf_path/config.json`, as of the last start."""

    digests: dict[str, str]
    changes: list[InputChange] = []


def read_inputs(run_dir: Path) -> RunInputs | None:
    """None for a run without a record. Raises ValueError for a damaged one."""
    path = run_dir / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunInputs)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def write_inputs(run_dir: Path, inputs: RunInputs) -> None:
    replace_file(run_dir / FILE_NAME, msgspec.json.format(msgspec.json.encode(inputs), indent=2).decode() + "\n")
