"""The table covers the checkpoints of each architecture tensor for tensor."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from minpro_megatron.models.architecture import Architecture, read_architecture
from minpro_megatron.weights.splits import GatedPair, QueryGroups, Replicated, ShardedAlong, Vocabulary
from minpro_megatron.weights.table import check_names, coverage, entries, left_out, table_name
from tests.mesh.reference import COMMON, model_architecture, saved_tensors
from tests.support.released_configs import QWEN3_0_6B, QWEN3_8B, QWEN3_14B, QWEN3_30B_A3B
from tests.support.tiny_architecture import TINY

DENSE = {"name": "Qwen3ForCausalLM", "num_experts": 0, "num_experts_per_token": 0, "expert_ffn_hidden_size": 0}


def architecture(**changes: object) -> Architecture:
    return Architecture(**{**vars(TINY), **changes})


@pytest.mark.parametrize("kind", ["mixture", "dense", "tied"])
def test_the_table_names_and_shapes_exactly_the_tensors_that_transformers_writes(kind: str, tmp_path: Path) -> None:
    common = {**COMMON, "num_hidden_layers": 2, "tie_word_embeddings": kind == "tied"}
    if kind == "mixture":
        experts: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        own = {**experts, "norm_topk_prob": True, "intermediate_size": 64}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **own))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common, intermediate_size=64))
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(tmp_path / "config.json")
    written = {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}
    table = entries(read_architecture(tmp_path))
    named = [pair for entry in table for pair in zip(entry.hf, entry.shapes, strict=True)]
    assert len(named) == len(dict(named))
    assert dict(named) == written


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (QWEN3_30B_A3B, 18_867, 30_532_122_624),
        (QWEN3_8B, 399, 8_190_735_360),
        (QWEN3_14B, 443, 14_768_307_200),
        (QWEN3_0_6B, 310, 596_049_920),
    ],
    ids=["30B-A3B", "8B", "14B", "0.6B"],
)
def test_released_models_have_the_published_totals(
    config: dict[str, Any], tensors: int, parameters: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    a = read_architecture(tmp_path)
    shapes = {name: shape for entry in entries(a) for name, shape in zip(entry.hf, entry.shapes, strict=True)}
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters
    assert a.padded_vocab_size == 151_936


def test_layers_and_experts_are_filled_in_and_ordered_layer_by_layer() -> None:
    found = entries(TINY)
    assert found[0].megatron == "embedding.word_embeddings.weight"
    assert [e.layer for e in found if e.layer is not None] == sorted(e.layer for e in found if e.layer is not None)
    fc1 = [e for e in found if e.megatron.endswith("linear_fc1.weight")]
    assert [(e.layer, e.expert) for e in fc1] == [(layer, expert) for layer in (0, 1) for expert in (0, 1, 2)]
    assert fc1[4].megatron == "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"
    assert fc1[4].hf == (
        "model.layers.1.mlp.experts.1.gate_proj.weight",
        "model.layers.1.mlp.experts.1.up_proj.weight",
    )
    assert fc1[4].axis == "expert_tensor"
    assert all(e.axis == "tensor" for e in found if e.expert is None)


def test_every_tensor_is_split_as_megatron_cuts_its_layer() -> None:
    by_kind = {
        "word_embeddings": Vocabulary(128),
        "output_layer": Vocabulary(128),
        "linear_qkv": QueryGroups(4, 2, 16),
        "linear_proj": ShardedAlong(1),  # row parallel: input features
        "linear_fc1": GatedPair(),
        "linear_fc2": ShardedAlong(1),
        "router": Replicated(),
        **dict.fromkeys(("input_layernorm", "pre_mlp_layernorm", "final_layernorm"), Replicated()),
        **dict.fromkeys(("q_layernorm", "k_layernorm"), Replicated()),
    }
    for ours in (TINY, architecture(**DENSE)):
        for entry in entries(ours):
            assert entry.split == by_kind[entry.megatron.split(".")[-2]], entry.megatron


def hf_names(a: Architecture) -> list[str]:
    return [name for entry in entries(a) for name in entry.hf]


def test_names_only_one_side_knows_are_refused_and_listed() -> None:
    names = hf_names(TINY)
    check_names(TINY, names, "hf")
    with pytest.raises(ValueError, match=r"^hf: 1 tensors are not in the table of Qwen3MoeForCausalLM: model.x; does"):
        check_names(TINY, [*names, "model.x"], "hf")
    with pytest.raises(
        ValueError, match=r"^hf: 4 tensors are missing for .*: model.embed_tokens.weight, .*, \.\.\.; does"
    ):
        check_names(TINY, names[4:], "hf")


def test_known_names_that_carry_no_weight_of_their_own_are_passed_over() -> None:
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    check_names(TINY, [*hf_names(TINY), rotary], "hf")
    tied = architecture(**DENSE, tied_embeddings=True)
    check_names(tied, [*hf_names(tied), "lm_head.weight"], "hf")
    found = coverage(tied, [*hf_names(tied), "lm_head.weight", rotary, "other"])
    assert (found.covered, found.missed, found.absent) == (hf_names(tied), ["other"], [])


def test_layers_that_predict_later_tokens_are_left_out_and_no_others() -> None:
    a = replace(TINY, prediction_layers=1)
    release = [*hf_names(a), "model.layers.2.eh_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    check_names(a, release, "hf")
    assert left_out(a, release) == release[-2:]
    with pytest.raises(ValueError, match=r"^hf: 1 tensors are not in the table of .*: model.layers.20.enorm.weight;"):
        check_names(a, [*release, "model.layers.20.enorm.weight"], "hf")
    assert left_out(TINY, release) == []


def test_a_layer_has_the_rows_of_its_kind() -> None:
    a = model_architecture("glm")
    found = {layer: {e.megatron.split(".", 3)[-1] for e in entries(a) if e.layer == layer} for layer in (0, 1)}
    assert {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"} == found[0] - found[1]
    assert {"mlp.router.weight", "mlp.router.expert_bias", "mlp.shared_experts.linear_fc1.weight"} <= found[1] - found[
        0
    ]
    bias = next(entry for entry in entries(a) if entry.megatron.endswith("expert_bias"))
    assert (bias.dtype(torch.bfloat16), entries(a)[0].dtype(torch.bfloat16)) == (torch.float32, torch.bfloat16)


def test_a_tensor_of_another_shape_is_refused_by_name() -> None:
    embedding = entries(TINY)[0]
    with pytest.raises(ValueError, match=r"^model.embed_tokens.weight: shape \(76, 32\), .* requires \(77, 32\); does"):
        embedding.join([torch.zeros(76, 32)])


def test_full_and_shard_shapes_are_those_of_the_tensors() -> None:
    for entry in entries(TINY):
        full = entry.join([torch.zeros(shape) for shape in entry.shapes])
        assert entry.full_shape == full.shape
        assert entry.shard_shape(2) == entry.split.shard(full, 1, 2).shape


def transformer_engine_name(name: str, mixture: bool, first_expert: int) -> str:
    """What megatron-core 0.19.2 calls the table's `name` in a model of Transformer Engine's layers."""
    name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
    if not mixture:
        return name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
    match = re.fullmatch(r"(.*\.experts)\.local_experts\.(\d+)\.(linear_fc[12])\.weight", name)
    return f"{match[1]}.{match[3]}.weight{int(match[2]) - first_expert}" if match else name


@pytest.mark.parametrize(("hf", "fused"), [(QWEN3_8B, 2 * 36), (QWEN3_30B_A3B, 48 + 2 * 128 * 48)])
def test_both_layer_backends_have_the_names_of_the_table(hf: dict, fused: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf))
    model = read_architecture(tmp_path)
    expert_ranks = 8 if model.num_experts else 1
    on_a_rank = model.num_experts // expert_ranks
    renamed = 0
    for entry in entries(model):
        first = entry.expert // on_a_rank * on_a_rank if entry.expert is not None else 0
        live = entry.megatron.replace(f"local_experts.{entry.expert}.", f"local_experts.{(entry.expert or 0) - first}.")
        assert table_name(live, first) == entry.megatron
        of_transformer_engine = transformer_engine_name(entry.megatron, model.num_experts > 0, first)
        assert table_name(of_transformer_engine, first) == entry.megatron
        renamed += of_transformer_engine != live
    assert renamed == fused
