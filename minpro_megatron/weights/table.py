"""The table that maps Hugging Face tensor names to Megatron parameter names, one per architecture.

Conversion, publishing and export all read this table; names carry global layer and expert numbers. Adding an
architecture is adding its rows here and its reader in architecture.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from minpro_megatron.weights.architecture import Architecture
from minpro_megatron.weights.splits import Along, GatedPair, QueryGroups, Split, Vocabulary, Whole


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and the HF tensors it is made of; templates of {layer} and {expert}."""

    megatron: str
    hf: tuple[str, ...]
    split: Split
    axis: Literal["tensor", "expert_tensor"] = "tensor"


@dataclass(frozen=True)
class Entry:
    """A Row filled in for one layer and one expert: the whole parameter, whichever ranks hold it."""

    megatron: str
    hf: tuple[str, ...]
    split: Split
    axis: Literal["tensor", "expert_tensor"]
    layer: int | None
    expert: int | None


def _qwen3_rows(a: Architecture) -> list[Row]:
    vocabulary = Vocabulary(a.vocab_size, a.padded_vocab_size)
    layer, hf = "decoder.layers.{layer}.", "model.layers.{layer}."
    attention = layer + "self_attention."
    rows = [
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary),
        Row(layer + "input_layernorm.weight", (hf + "input_layernorm.weight",), Whole()),
        Row(
            attention + "linear_qkv.weight",
            tuple(hf + f"self_attn.{kind}_proj.weight" for kind in "qkv"),
            QueryGroups(a.num_attention_heads, a.num_query_groups, a.head_dim),
        ),
        Row(attention + "q_layernorm.weight", (hf + "self_attn.q_norm.weight",), Whole()),
        Row(attention + "k_layernorm.weight", (hf + "self_attn.k_norm.weight",), Whole()),
        Row(attention + "linear_proj.weight", (hf + "self_attn.o_proj.weight",), Along(1)),
        Row(layer + "pre_mlp_layernorm.weight", (hf + "post_attention_layernorm.weight",), Whole()),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), Whole()),
    ]
    if not a.tied_embeddings:
        rows.append(Row("output_layer.weight", ("lm_head.weight",), vocabulary))
    return rows


def _dense_mlp_rows(_: Architecture) -> list[Row]:
    mlp, hf = "decoder.layers.{layer}.mlp.", "model.layers.{layer}.mlp."
    return [
        Row(mlp + "linear_fc1.weight", (hf + "gate_proj.weight", hf + "up_proj.weight"), GatedPair()),
        Row(mlp + "linear_fc2.weight", (hf + "down_proj.weight",), Along(1)),
    ]


def _expert_rows(_: Architecture) -> list[Row]:
    mlp, hf = "decoder.layers.{layer}.mlp.", "model.layers.{layer}.mlp."
    expert, hf_expert = mlp + "experts.local_experts.{expert}.", hf + "experts.{expert}."
    gate_and_up = (hf_expert + "gate_proj.weight", hf_expert + "up_proj.weight")
    return [
        Row(mlp + "router.weight", (hf + "gate.weight",), Whole()),
        Row(expert + "linear_fc1.weight", gate_and_up, GatedPair(), "expert_tensor"),
        Row(expert + "linear_fc2.weight", (hf_expert + "down_proj.weight",), Along(1), "expert_tensor"),
    ]


_TABLES: dict[str, list[Callable[[Architecture], list[Row]]]] = {
    "Qwen3ForCausalLM": [_qwen3_rows, _dense_mlp_rows],
    "Qwen3MoeForCausalLM": [_qwen3_rows, _expert_rows],
}


def entries(architecture: Architecture) -> list[Entry]:
    """Every parameter of the model, in the one order that all ranks and tools use: layer by layer."""
    rows = [row for part in _TABLES[architecture.name] for row in part(architecture)]
    before = [row for row in rows if "{layer}" not in row.megatron and row.megatron.startswith("embedding")]
    after = [row for row in rows if "{layer}" not in row.megatron and not row.megatron.startswith("embedding")]
    per_layer = [row for row in rows if "{layer}" in row.megatron]
    found = [_fill(row, None, None) for row in before]
    for layer in range(architecture.num_layers):
        for row in per_layer:
            found.extend(_per_expert(row, layer, architecture.num_experts))
    return found + [_fill(row, None, None) for row in after]


def _per_expert(row: Row, layer: int, num_experts: int) -> Iterator[Entry]:
    if "{expert}" not in row.megatron:
        yield _fill(row, layer, None)
        return
    for expert in range(num_experts):
        yield _fill(row, layer, expert)


def _fill(row: Row, layer: int | None, expert: int | None) -> Entry:
    def fill(template: str) -> str:
        return template.format(layer=layer, expert=expert)

    return Entry(fill(row.megatron), tuple(map(fill, row.hf)), row.split, row.axis, layer, expert)
