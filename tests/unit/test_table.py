"""The table covers the checkpoints of each architecture tensor for tensor."""

import math
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from minpro_megatron.weights.architecture import Architecture
from minpro_megatron.weights.splits import Along, GatedPair, QueryGroups, Vocabulary, Whole
from minpro_megatron.weights.table import entries
from tests.mesh.reference import COMMON, saved_tensors

TINY = Architecture(
    name="Qwen3MoeForCausalLM",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    ffn_hidden_size=64,
    num_experts=3,
    num_experts_per_token=2,
    expert_ffn_hidden_size=16,
    vocab_size=77,
    rope_theta=1e4,
    norm_epsilon=1e-6,
    tied_embeddings=False,
)
DENSE = {"name": "Qwen3ForCausalLM", "num_experts": 0, "num_experts_per_token": 0, "expert_ffn_hidden_size": 0}
# The published config.json of Qwen/Qwen3-30B-A3B.
QWEN3_30B_A3B = {
    "num_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_query_groups": 4,
    "head_dim": 128,
    "ffn_hidden_size": 6144,
    "num_experts": 128,
    "num_experts_per_token": 8,
    "expert_ffn_hidden_size": 768,
    "vocab_size": 151_936,
    "rope_theta": 1e6,
}


def architecture(**changes: object) -> Architecture:
    return Architecture(**{**vars(TINY), **changes})


def hf_shape(name: str, a: Architecture) -> tuple[int, ...]:
    """The shape of a Hugging Face tensor of Qwen3, from the sizes in the config."""
    ffn = a.expert_ffn_hidden_size if ".experts." in name else a.ffn_hidden_size
    shapes = {
        "embed_tokens": (a.vocab_size, a.hidden_size),
        "lm_head": (a.vocab_size, a.hidden_size),
        "norm": (a.hidden_size,),
        "input_layernorm": (a.hidden_size,),
        "post_attention_layernorm": (a.hidden_size,),
        "q_norm": (a.head_dim,),
        "k_norm": (a.head_dim,),
        "q_proj": (a.num_attention_heads * a.head_dim, a.hidden_size),
        "k_proj": (a.num_query_groups * a.head_dim, a.hidden_size),
        "v_proj": (a.num_query_groups * a.head_dim, a.hidden_size),
        "o_proj": (a.hidden_size, a.num_attention_heads * a.head_dim),
        "gate": (a.num_experts, a.hidden_size),
        "gate_proj": (ffn, a.hidden_size),
        "up_proj": (ffn, a.hidden_size),
        "down_proj": (a.hidden_size, ffn),
    }
    return shapes[name.removesuffix(".weight").rsplit(".", 1)[-1]]


@pytest.mark.parametrize("kind", ["mixture", "dense", "tied"])
def test_the_table_names_exactly_the_tensors_that_transformers_writes(kind: str) -> None:
    common = {**COMMON, "num_hidden_layers": 2, "tie_word_embeddings": kind == "tied"}
    if kind == "mixture":
        experts: dict[str, Any] = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        model, ours = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, intermediate_size=64, **experts)), TINY
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common, intermediate_size=64))
        ours = architecture(**DENSE, tied_embeddings=kind == "tied")
    written = {name: tuple(tensor.shape) for name, tensor in saved_tensors(model).items()}
    named = [name for entry in entries(ours) for name in entry.hf]
    assert len(named) == len(set(named))
    assert {name: hf_shape(name, ours) for name in named} == written


def test_qwen3_30b_a3b_has_18867_tensors_and_30532122624_parameters() -> None:
    a = architecture(**QWEN3_30B_A3B)
    names = [name for entry in entries(a) for name in entry.hf]
    assert len(names) == len(set(names)) == 18_867
    assert sum(math.prod(hf_shape(name, a)) for name in names) == 30_532_122_624
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
        "word_embeddings": Vocabulary(77, 128),
        "output_layer": Vocabulary(77, 128),
        "linear_qkv": QueryGroups(4, 2, 16),
        "linear_proj": Along(1),  # row parallel: input features
        "linear_fc1": GatedPair(),
        "linear_fc2": Along(1),
        "router": Whole(),
        **dict.fromkeys(("input_layernorm", "pre_mlp_layernorm", "final_layernorm"), Whole()),
        **dict.fromkeys(("q_layernorm", "k_layernorm"), Whole()),
    }
    for ours in (TINY, architecture(**DENSE)):
        for entry in entries(ours):
            assert entry.split == by_kind[entry.megatron.split(".")[-2]], entry.megatron
