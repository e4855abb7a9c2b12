"""The text files of a Hugging Face model folder: config, tokenizer, chat template and so on."""

import json
import shutil
from pathlib import Path

from minpro_megatron.errors import UserError

CONFIG = "config.json"
_PATTERNS = ("*.json", "*.txt", "*.jinja", "*.model", "additional_chat_templates/*.jinja")


def copy_texts(source: Path, folder: Path) -> list[str]:
    """Copies config, tokenizer and the other text files of a model folder, without indexes of weight files. Returns
    their names. Raises ValueError as text_files does."""
    copied = text_files(source)
    for name in copied:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / name)
    return copied


def text_files(source: Path) -> list[str]:
    """The names of a model folder's text files: config, tokenizer and so on, without indexes of weight files.

    Raises ValueError for a file that is not a regular file, and for a symbolic link out of the folder: in a downloaded
    folder such a link can name any file of this machine, which would then be copied with the model. The links of the
    Hugging Face cache, from `snapshots/` to the same model's `blobs/`, are followed.
    """
    inside = [source.resolve()]
    if source.resolve().parent.name == "snapshots":
        inside.append(source.resolve().parents[1] / "blobs")
    names = sorted({str(path.relative_to(source)) for pattern in _PATTERNS for path in source.glob(pattern)})
    names = [name for name in names if not name.endswith(".index.json")]
    for name in names:
        path = source / name
        if not path.is_file():
            raise UserError(f"{path}: this is not a regular file; remove it, or download the folder again")
        if not any(path.resolve().is_relative_to(folder) for folder in inside):
            raise UserError(
                f"{path}: this is a symbolic link to {path.resolve()}, outside the model's folder, so it is "
                "not copied with the model; replace it by a copy of the file"
            )
    return names


def other_files(source: Path) -> list[str]:
    """The names of the other files and folders of a model folder, which a conversion does not copy."""
    texts = set(text_files(source))
    weights = (".safetensors", ".safetensors.index.json")
    names = (path.name for path in source.iterdir() if not path.name.startswith("."))
    folders = {name.partition("/")[0] for name in texts if "/" in name}
    return sorted(name for name in names if name not in texts | folders and not name.endswith(weights))


def state_dtype(config_file: Path, dtype: str) -> None:
    """Sets the dtype in config.json to that of the weights: transformers would round them to the dtype in the file."""
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    for name in {"dtype", "torch_dtype"} & settings.keys():
        settings[name] = dtype
    config_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
