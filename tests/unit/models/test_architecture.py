"""config.json becomes an Architecture, or is refused with the field, its value and what is supported."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.models.architecture import Architecture, read_architecture, refuse_uneven_cuts
from tests.support.released_configs import GLM_4_5_AIR, QWEN3_8B, QWEN3_30B_A3B


def read(folder: Path, config: dict[str, Any]) -> Architecture:
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder)


def as_transformers_5_writes(config: dict[str, Any]) -> dict[str, Any]:
    changed = {key: value for key, value in config.items() if key not in ("rope_theta", "rope_scaling", "num_experts")}
    changed["rope_parameters"] = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    if "num_experts" in config:
        changed["num_local_experts"] = config["num_experts"]
    return changed


def test_the_released_mixture_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, QWEN3_30B_A3B) == Architecture(
        name="Qwen3MoeForCausalLM",
        num_layers=48,
        hidden_size=2048,
        num_attention_heads=32,
        num_query_groups=4,
        head_dim=128,
        ffn_hidden_size=6144,
        num_experts=128,
        num_experts_per_token=8,
        expert_ffn_hidden_size=768,
        vocab_size=151936,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        tied_embeddings=False,
    )


def test_the_released_dense_model_is_read(tmp_path: Path) -> None:
    found = read(tmp_path, QWEN3_8B)
    assert (found.name, found.num_experts, found.expert_ffn_hidden_size) == ("Qwen3ForCausalLM", 0, 0)
    assert (found.ffn_hidden_size, found.num_query_groups, found.rope_theta) == (12288, 8, 1e6)


@pytest.mark.parametrize("config", [QWEN3_30B_A3B, QWEN3_8B], ids=["mixture", "dense"])
def test_both_spellings_of_the_config_say_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    other = {**config, "rope_theta": 5e6}
    assert read(tmp_path, as_transformers_5_writes(other)) == read(tmp_path, other)
    assert read(tmp_path, other).rope_theta == 5e6


@pytest.mark.parametrize(("stated", "normalized"), [(True, True), (False, False), (None, False)])
def test_routing_is_normalized_where_the_config_says_so(stated: bool | None, normalized: bool, tmp_path: Path) -> None:
    config = {key: value for key, value in QWEN3_30B_A3B.items() if key != "norm_topk_prob"}
    stating = {} if stated is None else {"norm_topk_prob": stated}  # transformers takes false where it is absent
    assert read(tmp_path, config | stating).normalized_routing == normalized


def test_glm_is_read_in_both_spellings(tmp_path: Path) -> None:
    found = read(tmp_path, GLM_4_5_AIR)
    assert (found.num_layers, found.dense_layers, found.expert_layers, found.prediction_layers) == (46, 1, 45, 1)
    assert [found.has_experts(layer) for layer in (0, 1, 45)] == [False, True, True]
    assert (found.head_dim, found.rotary_dim, found.qkv_bias, found.qk_norm) == (128, 64, True, False)
    assert (found.expert_ffn_hidden_size, found.shared_ffn_hidden_size, found.ffn_hidden_size) == (1408, 1408, 10944)
    assert (found.sigmoid_routing, found.normalized_routing, found.routing_scale) == (True, True, 1.0)
    other = as_transformers_5_writes(GLM_4_5_AIR)
    del other["partial_rotary_factor"]
    other["rope_parameters"]["partial_rotary_factor"] = 0.5
    assert read(tmp_path, other) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 8, "topk_group": 4}, "n_group = 8 is not supported; only 1 is"),
        ({"topk_group": 2}, "topk_group = 2 is not supported; only 1 is"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False is not supported; only True is"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok = 1 must be an integer from 2 to 128"),
        ({"first_k_dense_replace": 46}, "first_k_dense_replace = 46 must be an integer from 0 to 45"),
        ({"partial_rotary_factor": 0.055}, "partial_rotary_factor = 0.055 must be at most 1 and choose an even number"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5 must be at most 1"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536}},
            "rope_scaling with partly rotated heads is not supported; remove it",
        ),
    ],
    ids=str,
)
def test_what_megatron_computes_differently_for_glm_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read(tmp_path, GLM_4_5_AIR | changes)


def test_tensor_ranks_must_divide_shared_experts_and_dense_layers(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 10_944, "moe_intermediate_size": 1401}
    with pytest.raises(ValueError, match=r"parallel.tensor = 2 must divide .* shared experts' width = 1401"):
        refuse_uneven_cuts(read(tmp_path, GLM_4_5_AIR | sizes), ParallelConfig(tensor=2))
    with pytest.raises(ValueError, match=r"parallel.tensor = 2 must divide the model's intermediate_size = 10943"):
        refuse_uneven_cuts(read(tmp_path, GLM_4_5_AIR | {"intermediate_size": 10_943}), ParallelConfig(tensor=2))


@pytest.mark.parametrize(("groups", "tensor", "fits"), [(4, 2, True), (1, 4, True), (2, 4, True), (6, 4, False)])
def test_tensor_ranks_and_key_value_heads_must_divide_one_another(
    groups: int, tensor: int, fits: bool, tmp_path: Path
) -> None:
    architecture = read(tmp_path, {**QWEN3_8B, "num_attention_heads": 24, "num_key_value_heads": groups})
    if fits:
        refuse_uneven_cuts(architecture, ParallelConfig(tensor=tensor))
    else:
        with pytest.raises(ValueError, match="must divide the model's num_key_value_heads = 6, or be a multiple"):
            refuse_uneven_cuts(architecture, ParallelConfig(tensor=tensor))


@pytest.mark.parametrize(
    ("layers", "settings", "message"),
    [
        (
            94,
            {"pipeline": 8},
            r"pipeline x virtual_pipeline = 8 must divide .*layers = 94, or parallel.pipeline_layers",
        ),
        (94, {"pipeline": 4}, r"say how many each has, such as 24\+24\+23\+23"),
        (3, {"pipeline": 2, "virtual_pipeline": 2}, r"= 4 must .*layers = 3; lower pipeline or virtual_pipeline"),
        (4, {"pipeline": 2, "pipeline_layers": [3, 2]}, r"pipeline_layers = 3\+2 adds up to 5, .*layers = 4: give"),
    ],
    ids=str,
)
def test_layers_that_the_pipeline_does_not_hold_are_refused(
    layers: int, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    architecture = read(tmp_path, {**QWEN3_8B, "num_hidden_layers": layers})
    with pytest.raises(ValueError, match=message):
        refuse_uneven_cuts(architecture, ParallelConfig(**settings))


def test_a_list_of_layers_lets_any_number_through(tmp_path: Path) -> None:
    architecture = read(tmp_path, {**QWEN3_8B, "num_hidden_layers": 5})
    refuse_uneven_cuts(architecture, ParallelConfig(pipeline=2, pipeline_layers=(3, 2)))


def test_tied_embeddings_and_a_missing_head_dim_are_read(tmp_path: Path) -> None:
    config = {key: value for key, value in QWEN3_8B.items() if key != "head_dim"}
    found = read(tmp_path, {**config, "tie_word_embeddings": True})
    assert found.tied_embeddings
    assert found.head_dim == 4096 // 32


@pytest.mark.parametrize(("size", "padded"), [(151_936, 151_936), (77, 128), (129, 256), (128, 128)])
def test_the_vocabulary_is_padded_to_a_fixed_multiple(size: int, padded: int, tmp_path: Path) -> None:
    assert read(tmp_path, {**QWEN3_8B, "vocab_size": size}).padded_vocab_size == padded


@pytest.mark.parametrize(
    ("field", "value", "supported"),
    [
        ("attention_bias", True, "only False"),
        ("use_sliding_window", True, "only False"),
        ("hidden_act", "gelu", "only 'silu'"),
        ("decoder_sparse_step", 2, "only 1"),
        ("mlp_only_layers", [0], r"only \[\]"),
    ],
)
def test_unsupported_settings_are_refused_by_field_value_and_rule(
    field: str, value: Any, supported: str, tmp_path: Path
) -> None:
    shown = False if value is None else value
    with pytest.raises(ValueError, match=rf"config.json: {field} = .*is not supported; {supported}") as refused:
        read(tmp_path, {**QWEN3_30B_A3B, field: value})
    assert repr(shown) in str(refused.value)


@pytest.mark.parametrize(
    "field",
    ["num_hidden_layers", "vocab_size", "rms_norm_eps", "rope_theta", "num_experts", "moe_intermediate_size"],
)
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    config = {key: value for key, value in QWEN3_30B_A3B.items() if key != field}
    with pytest.raises(ValueError, match=f"config.json: {field} is missing"):
        read(tmp_path, config)


def test_another_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for names in (["GPT2LMHeadModel"], [], None):
        with pytest.raises(ValueError, match=r"architectures = .* is not known; known: Glm4MoeForCausalLM, Llama"):
            read(tmp_path, {**QWEN3_8B, "architectures": names})


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.hf_path = .*there is no config.json; give a Hugging Face"):
        read_architecture(tmp_path / "absent")


def with_depth(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"the file is empty; download it again"),
        ("[]", r"expected a JSON object, got list"),
        ('{"vocab_size": 7,}', r"not JSON \("),
        ("\ufeff{}", r"not JSON \(.*BOM"),
        (b"\xff\xfe{}", r"not JSON \("),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", r"a Git LFS pointer .*git lfs pull"),
        (with_depth(200_000), r"not JSON of a model \(it is nested too deeply\)"),
    ],
    ids=["empty", "list", "comma", "byte order mark", "UTF-16", "Git LFS", "deep"],
)
def test_a_broken_config_is_refused_with_its_path(content: str | bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}: .*{message}"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo], ids=["folder", "pipe"])
def test_a_config_that_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"there is no config.json"):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", "4", "num_hidden_layers = '4' must be an integer from 1 to 4096"),
        ("num_hidden_layers", 10**9, "num_hidden_layers = 1000000000 must be an integer from 1 to 4096"),
        ("num_experts", 10**7, "num_experts = 10000000 must be an integer from 1 to 65536"),
        ("num_experts_per_tok", 1000, "num_experts_per_tok = 1000 must be an integer from 1 to 128"),
        ("hidden_size", 0, "hidden_size = 0 must be an integer from 1"),
        ("vocab_size", 1.5, "vocab_size = 1.5 must be an integer"),
        ("num_attention_heads", True, "num_attention_heads = True must be an integer"),
        ("head_dim", [128], r"head_dim = \[128\] must be an integer"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps = '1e-6' must be a number above 0"),
        ("rope_theta", -1, "rope_theta = -1 must be a number above 0"),
        ("tie_word_embeddings", "false", "tie_word_embeddings = 'false' must be true or false"),
        ("norm_topk_prob", 1, "norm_topk_prob = 1 must be true or false"),
        ("rope_parameters", "default", "rope_parameters = 'default' must be an object"),
        ("architectures", "Qwen3MoeForCausalLM", "architectures = 'none' is not known"),
        ("architectures", [["Qwen3"]], r"architectures = \['Qwen3'\] is not known"),
        ("quantization_config", {"quant_method": "fp8"}, "quant_method = 'fp8': these are quantized weights"),
        ("compression_config", {"quant_method": "awq"}, "quant_method = 'awq': these are quantized weights"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_file_and_field(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"config.json: .*{message}"):
        read(tmp_path, {**QWEN3_30B_A3B, field: value})
