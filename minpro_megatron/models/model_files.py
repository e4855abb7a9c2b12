"""Facts about a Hugging Face checkpoint that a rollout server and its clients need, read without torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minpro_megatron.errors import UserError

MAX_JSON_BYTES = 256 << 20  # tokenizer.json, the largest of these files, has about 10 MB
_LFS_BEGINS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """`vocabulary_size` is the number of embedding rows: a larger token id in a prompt would crash the server.

    A dense model has `num_experts` = `experts_per_token` = 0.
    """

    vocabulary_size: int
    stop_token_ids: tuple[int, ...]
    max_position_embeddings: int
    num_layers: int = 0
    num_experts: int = 0
    experts_per_token: int = 0


def model_file(hf_path: str, name: str) -> Path:
    """The file `name` of a checkpoint folder, or of a hub id (downloaded if it is not in the cache).

    Raises FileNotFoundError that names the setting if there is no such file.
    """
    folder = Path(hf_path)
    if folder.is_dir():
        path = folder / name
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(hf_path, name))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"model.hf_path = {hf_path!r}: not a folder, and {name} cannot be downloaded from the hub ({error}); "
                "give an existing folder or a hub id"
            ) from None
    if not path.is_file():
        raise FileNotFoundError(f"model.hf_path = {hf_path!r}: the file {name} is missing; export the checkpoint again")
    return path


def read_model_facts(hf_path: str, extra_stop_tokens: Sequence[str] = ()) -> ModelFacts:
    """The facts in config.json and, if it exists, generation_config.json.

    The stop tokens are those of both files, because an SGLang server stops at either, and `extra_stop_tokens`, given by
    their text in tokenizer.json. Raises ValueError that names file and field for a value that is missing or damaged.
    """
    config_path = model_file(hf_path, "config.json")
    config = read_json_object(config_path)
    try:
        generation = read_json_object(model_file(hf_path, "generation_config.json"))
    except FileNotFoundError:
        generation = {}
    vocabulary_size = _positive(config, "vocab_size", config_path)
    extra = [_added_token_id(hf_path, token) for token in extra_stop_tokens]
    stop_token_ids = sorted({*_token_ids(config, config_path), *_token_ids(generation, config_path), *extra})
    if not stop_token_ids:
        raise UserError(f"{config_path}: eos_token_id is missing: without a stop token no response can end")
    if stop_token_ids[0] < 0 or stop_token_ids[-1] >= vocabulary_size:
        raise UserError(
            f"{config_path}: eos_token_id = {stop_token_ids} must lie within vocab_size = {vocabulary_size}"
        )
    return ModelFacts(
        vocabulary_size=vocabulary_size,
        stop_token_ids=tuple(stop_token_ids),
        max_position_embeddings=_positive(config, "max_position_embeddings", config_path),
        **_expert_facts(config, config_path),
    )


def max_positions(folder: Path) -> int | None:
    """max_position_embeddings of the folder's config.json; None if it is not given."""
    path = folder / "config.json"
    config = read_json_object(path)
    return _positive(config, "max_position_embeddings", path) if "max_position_embeddings" in config else None


def _expert_facts(config: dict[str, Any], path: Path) -> dict[str, int]:
    # transformers 5 writes num_local_experts where the released checkpoints say num_experts; GLM says n_routed_experts
    spellings = ("num_local_experts", "num_experts", "n_routed_experts")
    num_experts = next((name for name in spellings if name in config), None)
    if num_experts is None:
        return {}
    fields = {
        "num_layers": "num_hidden_layers",
        "num_experts": num_experts,
        "experts_per_token": "num_experts_per_tok",
    }
    return {name: _positive(config, field, path) for name, field in fields.items()}


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file's object. Raises ValueError that names the file if it contains anything else, or is not a regular
    file."""
    if not path.exists():
        raise UserError(f"{path}: there is no such file; give a complete Hugging Face model folder")
    if not path.is_file():  # opening a pipe would wait for its other end
        raise UserError(f"{path}: this is not a regular file; download the folder again")
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise UserError(f"{path}: {size} bytes, more than the limit of {MAX_JSON_BYTES}; download it again")
    if is_lfs_pointer(path):
        raise UserError(lfs_problem(path))
    if not size:
        raise UserError(f"{path}: the file is empty; download it again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise UserError(f"{path}: not JSON of a model (it is nested too deeply); export the checkpoint again") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); export the checkpoint again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}; export the checkpoint again")
    return content


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file is a Git LFS pointer: the few lines that Git stores for a large file without Git LFS."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS_BEGINS)) == _LFS_BEGINS


def lfs_problem(path: Path) -> str:
    return f"{path}: this is a Git LFS pointer and not the file; run 'git lfs pull' there, or download it again"


def added_tokens(hf_path: str) -> dict[str, int]:
    """The ids of the special tokens in tokenizer.json by their text."""
    added = read_json_object(model_file(hf_path, "tokenizer.json")).get("added_tokens")
    entries = [entry for entry in added or [] if isinstance(entry, dict)]
    known = {entry.get("content"): entry.get("id") for entry in entries}
    return {text: token for text, token in known.items() if isinstance(text, str) and isinstance(token, int)}


def _added_token_id(hf_path: str, token: str) -> int:
    known, path = added_tokens(hf_path), model_file(hf_path, "tokenizer.json")
    token_id = known.get(token)
    if token_id is None:
        shown = ", ".join(repr(content) for content in list(known)[:8])
        raise UserError(
            f"sampling.extra_stop_tokens: {token!r} is not a special token of {path}; some of them: {shown}"
        )
    return token_id


def _positive(config: dict[str, Any], field: str, path: Path) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{path}: {field} = {value!r} must be a positive integer")
    return value


def _token_ids(config: dict[str, Any], path: Path) -> list[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise UserError(f"{path}: eos_token_id = {value!r} must be a token id or a list of them")
    return ids
