"""Reads weights from memory that a trainer on this machine shares: the server's side of publishing/shared_memory.py."""

import base64
import pickle
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions
from torch.storage import UntypedStorage

from minpro_megatron.reference_engine.update_groups import DTYPES, UpdateRefused

# Everything that the message of a bucket names; any other name is refused before anything is called.
_NAMES: dict[tuple[str, str], Any] = {
    ("torch.multiprocessing.reductions", "rebuild_tensor"): reductions.rebuild_tensor,
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"): reductions.rebuild_typed_storage,
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"): reductions.rebuild_storage_filename,
    ("torch.storage", "UntypedStorage"): UntypedStorage,
    ("torch", "Tensor"): Tensor,
    ("torch", "Size"): torch.Size,
    ("torch", "uint8"): torch.uint8,
    ("types", "SimpleNamespace"): SimpleNamespace,
} | {("torch", name): dtype for name, dtype in DTYPES.items()}


class _BucketUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        found = _NAMES.get((module_name, global_name))
        if found is None:
            raise UpdateRefused(f"the message names {module_name}.{global_name}, which no bucket of weights contains")
        return found


def read_bucket(message: str) -> list[tuple[str, Tensor]]:
    """The named tensors of a message. They are copies: the trainer writes the next bucket into the same memory. Raises
    UpdateRefused."""
    try:
        content = _BucketUnpickler(BytesIO(base64.b64decode(message, validate=True))).load()
        flat, places = content["flattened_tensor"], content["metadata"]
        return [
            (place.name, flat[place.start_idx : place.end_idx].clone().view(place.dtype).view(place.shape))
            for place in places
        ]
    except UpdateRefused:
        raise
    except Exception as error:  # what a damaged pickle raises can be anything
        raise UpdateRefused(f"Failed to read the bucket: {type(error).__name__}: {error}") from None
