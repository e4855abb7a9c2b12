"""The weight files of a Hugging Face folder, and the file of each tensor, read without torch."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import is_lfs_pointer, lfs_problem, read_json_object

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# transformers 5 stores the experts of a layer in two tensors, and saves them like this with save_original_format=False:
# [experts, 2 * width, hidden], the gate's rows first, and [experts, hidden, width].
FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")


def read_weight_map(folder: Path) -> dict[str, str]:
    """{tensor name: file name} of the folder's index, empty for a model in one file.

    Raises ValueError if there is neither, if there are two sets of weights, or if the index is damaged or names files
    outside the folder.
    """
    index, single = folder / INDEX, folder / SINGLE_FILE
    if not index.is_file():
        if single.is_file():
            if others := sorted(path.name for path in folder.glob("model-*-of-*.safetensors")):
                raise UserError(
                    f"{folder}: it holds two sets of weights, {SINGLE_FILE} and {others[0]} (without {INDEX}), and "
                    "programs differ in which one they load; move one set elsewhere"
                )
            return {}
        if parts := sorted(path.name for path in folder.glob("*.safetensors")):
            raise UserError(
                f"{folder}: there are {len(parts)} files such as {parts[0]}, but no {INDEX} that says what they hold; "
                "download it too"
            )
        raise UserError(
            f"{folder}: there is neither {SINGLE_FILE} nor {INDEX}; pickled weights are refused, "
            "convert them to safetensors first"
        )
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: it has no weight_map; download the folder again")
    for file in weight_map.values():
        if not (isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file):
            raise UserError(
                f"{index}: {file!r} is not the name of a safetensors file in the same folder; pickles are refused"
            )
    if single.is_file() and SINGLE_FILE not in weight_map.values():
        raise UserError(
            f"{folder}: it holds two sets of weights, {SINGLE_FILE} and the files that {INDEX} names, and programs "
            "differ in which one they load; move one set elsewhere"
        )
    return weight_map


def shard_names(count: int) -> list[str]:
    """The names of a model's weight files, as Hugging Face numbers them."""
    return [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def weight_problem(folder: Path, for_servers: bool = True) -> str:
    """Why the weights of a Hugging Face folder cannot be loaded, with the remedy; empty if nothing is wrong with them.

    Only names and headers are read. `for_servers`: SGLang loads a layer's experts only from the original format.
    """
    try:
        if not any(folder.glob("*.safetensors")):
            return "no *.safetensors file; download the folder again"
        weight_map = read_weight_map(folder)
    except UserError as error:
        return str(error)
    files = sorted(set(weight_map.values()) or {SINGLE_FILE})
    if absent := [name for name in files if not (folder / name).is_file()]:
        return f"{len(absent)} of {len(files)} weight files missing, such as {absent[0]}; download the folder again"
    for name in files:
        if is_lfs_pointer(folder / name):
            return lfs_problem(folder / name)
    if for_servers and any(FUSED_EXPERTS.fullmatch(name) for name in weight_map or _names_in(folder / SINGLE_FILE)):
        return (
            "the experts of a layer are fused into one tensor, as transformers 5 saves them with "
            "save_original_format=False, and the servers cannot load this format; convert it with "
            "`minpro convert to-megatron` and `to-hf`, and give the result"
        )
    return ""


def _names_in(file: Path) -> list[str]:
    """The names of the tensors in a safetensors file; empty for any other file, which its reader reports."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError):
        return []
