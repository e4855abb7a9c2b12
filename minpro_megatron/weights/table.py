"""The table that maps Hugging Face tensor names to Megatron parameter names, one per architecture.

Conversion, planning, publishing and export all read this table; names contain global layer and expert numbers. To add
an architecture, add its rows here and its reader in architecture.py.
"""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.weights.splits import GatedPair, QueryGroups, Replicated, ShardedAlong, Split, Vocabulary

type Axis = Literal["tensor", "expert_tensor"]
type Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
# Tensors in old exports that every implementation computes itself.
_NOT_WEIGHTS = re.compile(r"\.rotary_emb\.inv_freq$")
# Transformer Engine's names of parameters with other names in the table: a norm's weight is part of the projection that
# it is fused with, and the experts of a rank are numbered weights of one module.
_FUSED = [
    (re.compile(r"\.self_attention\.linear_qkv\.layer_norm_weight$"), ".input_layernorm.weight"),
    (re.compile(r"\.mlp\.linear_fc1\.layer_norm_weight$"), ".pre_mlp_layernorm.weight"),
    (re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r".mlp.experts.local_experts.\2.\1.weight"),
]
_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


@dataclass(frozen=True)
class Row:
    """One Megatron parameter and its HF tensors: name templates with {layer} and {expert}, and shapes."""

    megatron: str
    hf: dict[str, Shape]
    split: Split
    axis: Axis = "tensor"
    layers: range | None = None  # those that have it; None: all
    dtype: torch.dtype | None = None  # whatever the dtype of the model is; None: that of the model


@dataclass(frozen=True)
class Entry:
    """A Row for one layer and one expert: the whole parameter, independent of how ranks shard it."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of the HF tensors
    split: Split
    axis: Axis
    layer: int | None
    expert: int | None
    fixed_dtype: torch.dtype | None = None  # as Row.dtype

    def dtype(self, of_model: torch.dtype) -> torch.dtype:
        """The parameter's dtype in a model of this dtype, in both formats."""
        return self.fixed_dtype or of_model

    @property
    def rows(self) -> list[int]:
        return [shape[0] for shape in self.shapes]

    @property
    def full_shape(self) -> Shape:
        """The whole parameter's shape in Megatron, vocabulary padding included."""
        return (self.split.full_rows(self.rows), *self.shapes[0][1:])

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The whole parameter. Raises ValueError that names a tensor whose shape differs from the table."""
        for name, shape, tensor in zip(self.hf, self.shapes, tensors, strict=True):
            check_shape(name, tuple(tensor.shape), shape)
        return self.split.join(tensors)

    def part(self, full: Tensor) -> list[Tensor]:
        """The HF tensors of the whole parameter, in the order of `hf`."""
        return self.split.part(full, self.rows)

    def shard_shape(self, size: int) -> Shape:
        """The shape of one rank's shard on an axis of `size` ranks."""
        return tuple(self.split.shard(torch.empty(self.full_shape, device="meta"), 0, size).shape)


def check_shape(name: str, found: Shape, expected: Shape) -> None:
    if found != expected:
        raise UserError(
            f"{name}: shape {found}, but config.json requires {expected}; does config.json belong to these weights?"
        )


def _attention_rows(a: Architecture) -> list[Row]:
    vocabulary = Vocabulary(a.padded_vocab_size)
    embedding, hidden = (a.vocab_size, a.hidden_size), (a.hidden_size,)
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    layer, hf = "decoder.layers.{layer}.", "model.layers.{layer}."
    attention, hf_attention = layer + "self_attention.", hf + "self_attn."
    projections = {
        hf_attention + "q_proj.weight": (queries, a.hidden_size),
        hf_attention + "k_proj.weight": (keys, a.hidden_size),
        hf_attention + "v_proj.weight": (keys, a.hidden_size),
    }
    groups = QueryGroups(a.num_attention_heads, a.num_query_groups, a.head_dim)
    rows = [
        Row("embedding.word_embeddings.weight", {EMBEDDING: embedding}, vocabulary),
        Row(layer + "input_layernorm.weight", {hf + "input_layernorm.weight": hidden}, Replicated()),
        Row(attention + "linear_qkv.weight", projections, groups),
        *(_qkv_bias_rows(attention, projections, groups) if a.qkv_bias else []),
        *(_qk_norm_rows(attention, hf_attention, a.head_dim) if a.qk_norm else []),
        Row(
            attention + "linear_proj.weight",
            {hf_attention + "o_proj.weight": (a.hidden_size, queries)},
            ShardedAlong(1),
        ),
        Row(layer + "pre_mlp_layernorm.weight", {hf + "post_attention_layernorm.weight": hidden}, Replicated()),
        Row("decoder.final_layernorm.weight", {"model.norm.weight": hidden}, Replicated()),
    ]
    if not a.tied_embeddings:
        rows.append(Row("output_layer.weight", {OUTPUT: embedding}, vocabulary))
    return rows


def _qkv_bias_rows(megatron: str, projections: dict[str, Shape], groups: QueryGroups) -> list[Row]:
    biases = {name.removesuffix("weight") + "bias": shape[:1] for name, shape in projections.items()}
    return [Row(megatron + "linear_qkv.bias", biases, groups)]


def _qk_norm_rows(megatron: str, hf: str, head_dim: int) -> list[Row]:
    return [
        Row(f"{megatron}{part}_layernorm.weight", {f"{hf}{part}_norm.weight": (head_dim,)}, Replicated())
        for part in ("q", "k")
    ]


def _mlp_rows(megatron: str, hf: str, hidden: int, width: int, axis: Axis, layers: range | None = None) -> list[Row]:
    gate_and_up = {hf + "gate_proj.weight": (width, hidden), hf + "up_proj.weight": (width, hidden)}
    down = {hf + "down_proj.weight": (hidden, width)}
    return [
        Row(megatron + "linear_fc1.weight", gate_and_up, GatedPair(), axis, layers),
        Row(megatron + "linear_fc2.weight", down, ShardedAlong(1), axis, layers),
    ]


def _dense_mlp_rows(a: Architecture) -> list[Row]:
    mlp, hf = "decoder.layers.{layer}.mlp.", "model.layers.{layer}.mlp."
    layers = range(a.num_layers - a.expert_layers)
    return _mlp_rows(mlp, hf, a.hidden_size, a.ffn_hidden_size, "tensor", layers)


def _expert_rows(a: Architecture) -> list[Row]:
    mlp, hf = "decoder.layers.{layer}.mlp.", "model.layers.{layer}.mlp."
    expert, hf_expert = mlp + "experts.local_experts.{expert}.", hf + "experts.{expert}."
    layers = range(a.num_layers - a.expert_layers, a.num_layers)
    router = {hf + "gate.weight": (a.num_experts, a.hidden_size)}
    return [
        Row(mlp + "router.weight", router, Replicated(), layers=layers),
        *_mlp_rows(expert, hf_expert, a.hidden_size, a.expert_ffn_hidden_size, "expert_tensor", layers),
    ]


def _shared_expert_rows(a: Architecture) -> list[Row]:
    """With the bias of the choice of experts, which releases hold in float32 beside weights of bfloat16."""
    mlp, hf = "decoder.layers.{layer}.mlp.", "model.layers.{layer}.mlp."
    layers = range(a.num_layers - a.expert_layers, a.num_layers)
    bias = {hf + "gate.e_score_correction_bias": (a.num_experts,)}
    shared, hf_shared = mlp + "shared_experts.", hf + "shared_experts."
    return [
        Row(mlp + "router.expert_bias", bias, Replicated(), layers=layers, dtype=torch.float32),
        *_mlp_rows(shared, hf_shared, a.hidden_size, a.shared_ffn_hidden_size, "tensor", layers),
    ]


_TABLES: dict[str, list[Callable[[Architecture], list[Row]]]] = {
    "Glm4MoeForCausalLM": [_attention_rows, _dense_mlp_rows, _expert_rows, _shared_expert_rows],
    "LlamaForCausalLM": [_attention_rows, _dense_mlp_rows],
    "Qwen2ForCausalLM": [_attention_rows, _dense_mlp_rows],
    "Qwen3ForCausalLM": [_attention_rows, _dense_mlp_rows],
    "Qwen3MoeForCausalLM": [_attention_rows, _expert_rows],
}


def entries(architecture: Architecture) -> list[Entry]:
    """Every parameter of the model, layer by layer, in the order that all ranks and tools use."""
    rows = [row for part in _TABLES[architecture.name] for row in part(architecture)]
    before = [row for row in rows if "{layer}" not in row.megatron and row.megatron.startswith("embedding")]
    after = [row for row in rows if "{layer}" not in row.megatron and not row.megatron.startswith("embedding")]
    per_layer = [row for row in rows if "{layer}" in row.megatron]
    found = [_fill(row, None, None) for row in before]
    for layer in range(architecture.num_layers):
        for row in per_layer:
            if row.layers is None or layer in row.layers:
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

    shapes = tuple(row.hf.values())
    return Entry(fill(row.megatron), tuple(map(fill, row.hf)), shapes, row.split, row.axis, layer, expert, row.dtype)


def table_name(live_name: str, first_expert: int) -> str:
    """The table's name of a parameter named `live_name` in a model of either layer backend; the layer is unchanged.

    `first_expert`: the number in the model of the rank's first expert.

    >>> table_name("decoder.layers.3.mlp.experts.linear_fc1.weight1", first_expert=4)
    'decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight'
    """
    for fused, plain in _FUSED:
        live_name = fused.sub(plain, live_name)
    return _LOCAL_EXPERT.sub(lambda match: f".local_experts.{first_expert + int(match[1])}.", live_name)


@dataclass(frozen=True)
class Coverage:
    """The differences between a set of HF tensor names and the table."""

    covered: list[str]
    missed: list[str]  # in the folder but not in the table: they would be lost
    absent: list[str]  # in the table but not in the folder: parameters would stay uninitialized


def coverage(architecture: Architecture, hf_names: Collection[str]) -> Coverage:
    """Compares the HF names with the table. Names that are not weights, layers that are left out, and the output layer
    that some tied models save a second time, are ignored."""
    table = [name for entry in entries(architecture) for name in entry.hf]
    known, given = set(table), set(hf_names)
    assert len(known) == len(table), "the table names a tensor twice"
    passed = known | set(left_out(architecture, hf_names)) | ({OUTPUT} if architecture.tied_embeddings else set())
    missed = [name for name in hf_names if name not in passed and not _NOT_WEIGHTS.search(name)]
    return Coverage([name for name in hf_names if name in known], missed, [name for name in table if name not in given])


def left_out(architecture: Architecture, hf_names: Collection[str]) -> list[str]:
    """The names of the tensors of layers that predict later tokens: they are neither trained nor sent to servers."""
    first = architecture.num_layers
    prefixes = tuple(f"model.layers.{first + index}." for index in range(architecture.prediction_layers))
    return [name for name in hf_names if name.startswith(prefixes)]


def check_names(architecture: Architecture, hf_names: Collection[str], where: str) -> None:
    """Raises ValueError that names the tensors that are only in the folder `where`, or only in the table."""
    found = coverage(architecture, hf_names)
    for names, what in ((found.missed, "not in the table of"), (found.absent, "missing for")):
        if names:
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(
                f"{where}: {len(names)} tensors are {what} {architecture.name}: {listed}; "
                "does config.json belong to these weights?"
            )
