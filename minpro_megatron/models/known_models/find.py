"""The config.json of models for which runs are planned before the models are downloaded: one JSON file per model.

Each has the values of the config.json of the release that its name says, or that it names as `_name_or_path`. Plans and
rehearsals read sizes only, so a name also stands for releases of the same sizes with other positions: the 2507 releases
of Qwen3 rotate with another base and have 262,144 positions. Training reads the config.json of model.hf_path.
"""

import json
from pathlib import Path
from typing import Any

from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import Architecture, parse_architecture, read_architecture

FOLDER = Path(__file__).resolve().parent
# Suffixes of releases of a model with the same sizes.
_VARIANTS = ("-base", "-instruct", "-instruct-2507", "-thinking-2507")


def known_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def known_config(name: str) -> dict[str, Any]:
    """The config.json published with the model `name`, such as qwen3-30b-a3b."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def known_name(hf_path: str) -> str | None:
    """The known model that is named in a part of a hub id or a path; None if there is none.

    >>> known_name("Qwen/Qwen3-30B-A3B-Base"), known_name("/models/qwen3-8b/hf"), known_name("/models/mine")
    ('qwen3-30b-a3b', 'qwen3-8b', None)
    """
    names = set(known_names())
    for part in reversed(hf_path.lower().split("/")):
        part = part.removeprefix("meta-")  # Meta-Llama-3.1-8B is the earlier name of Llama-3.1-8B
        for variant in _VARIANTS:
            part = part.removesuffix(variant)
        if part in names:
            return part
    return None


def find_architecture(hf_path: str) -> Architecture:
    """The architecture of the folder `hf_path`, or of the known model that it names if the folder does not exist.

    Raises ValueError if there is neither, or the architecture is not supported.
    """
    if (Path(hf_path) / "config.json").is_file():
        return read_architecture(hf_path)
    name = known_name(hf_path)
    if name is None:
        raise UserError(
            f"model.hf_path = {hf_path}: there is no config.json here, and no part of it names a known model; known: "
            f"{', '.join(known_names())}; give a folder with the model's config.json"
        )
    return parse_architecture(known_config(name), name)
