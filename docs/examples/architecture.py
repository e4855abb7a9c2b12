"""An example of a new architecture: dense Qwen3 layers, stored under other tensor names.

`BlocksForCausalLM` stands for an architecture whose layers are stored as `blocks.0`, `blocks.1` and so on.
tests/unit/repository/test_examples.py registers it and converts a model of it to Megatron's format and back.
"""

from dataclasses import replace

from minpro_megatron.models.architecture import Architecture
from minpro_megatron.weights.table import Row

NAME = "BlocksForCausalLM"


def blocks_architecture(qwen3: Architecture) -> Architecture:
    """The sizes are those of dense Qwen3, whose config.json fields the architecture shares."""
    return replace(qwen3, name=NAME)


def blocks_rows(qwen3_rows: list[Row]) -> list[Row]:
    """Qwen3's rows with the stored tensors' names changed; names and splits of the Megatron side stay."""
    return [replace(row, hf={_renamed(name): shape for name, shape in row.hf.items()}) for row in qwen3_rows]


def _renamed(name: str) -> str:
    return name.replace("model.layers.", "blocks.")
