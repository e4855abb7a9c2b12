"""The inputs that a run was started with: digests of its data and model files, and which files were replaced later."""

from pathlib import Path

import msgspec

from minpro_megatron.errors import UserError
from minpro_megatron.files.replacement import replace_file

FILE_NAME = "inputs.json"


class InputChange(msgspec.Struct, frozen=True):
    """Files whose content had changed when the run was resumed, with the user's consent."""

    global_step: int  # at which the run was resumed
    names: list[str]


class RunInputs(msgspec.Struct, frozen=True):
    """SHA-256 of each input by name, such as `data.train_file` or `model.hf_path/config.json`, at the last start."""

    digests: dict[str, str]
    changes: list[InputChange] = []


def read_inputs(run_dir: Path) -> RunInputs | None:
    """The record of the run's inputs; None if there is none. Raises ValueError if it is damaged."""
    path = run_dir / FILE_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunInputs)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def write_inputs(run_dir: Path, inputs: RunInputs) -> None:
    replace_file(run_dir / FILE_NAME, msgspec.json.format(msgspec.json.encode(inputs), indent=2).decode() + "\n")
