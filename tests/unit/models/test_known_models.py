"""Every checked-in config.json is planned with as many parameters as the release has, and is found by its names."""

import math

import pytest

from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.models.architecture import parse_architecture, refuse_uneven_cuts
from minpro_megatron.models.known_models.find import find_architecture, known_config, known_name, known_names
from minpro_megatron.planning.parameters import model_parameters
from minpro_megatron.weights.table import entries

# The numbers of parameters that the hub's pages of the releases state (those of their safetensors files; for the tied
# Qwen3 models, whose files hold the embedding twice, without the second one). Those of GLM-4.6 and 4.7 are GLM-4.5's
# and were not compared with their pages.
PUBLISHED = {
    "glm-4.5": 352_797_829_024,  # this and the other GLMs without the layer that predicts later tokens, see below
    "glm-4.5-air": 106_852_251_264,
    "glm-4.6": 352_797_829_024,
    "glm-4.7": 352_797_829_024,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-math-1.5b": 1_543_714_304,
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen2.5-math-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}


def test_every_known_model_has_its_published_number() -> None:
    assert set(PUBLISHED) == set(known_names())


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_the_planner_and_the_table_count_what_the_release_has(name: str, parameters: int) -> None:
    architecture = find_architecture(name)
    assert model_parameters(architecture) == parameters
    assert sum(math.prod(shape) for entry in entries(architecture) for shape in entry.shapes) == parameters
    refuse_uneven_cuts(architecture, ParallelConfig(tensor=2))


@pytest.mark.parametrize(
    ("hf_path", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("/models/Qwen2.5-Math-1.5B/hf", "qwen2.5-math-1.5b"),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3-30b-a3b"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("zai-org/GLM-4.5-Air-Base", "glm-4.5-air"),
        ("Qwen/Qwen2.5-Coder-7B", None),
    ],
)
def test_a_release_is_found_by_its_hub_id_and_by_a_part_of_a_path(hf_path: str, name: str | None) -> None:
    assert known_name(hf_path) == name


@pytest.mark.parametrize(("name", "parameters"), [("glm-4.5", 358_337_791_296), ("glm-4.5-air", 110_468_824_832)])
def test_the_layer_that_glm_is_read_without_is_the_rest_of_the_release(name: str, parameters: int) -> None:
    """The release has one more layer, with embedding, output layer, projection of two states to one, and norms."""
    a = find_architecture(name)
    last = sum(math.prod(shape) for entry in entries(a) if entry.layer == a.num_layers - 1 for shape in entry.shapes)
    prediction = last + 2 * a.vocab_size * a.hidden_size + 2 * a.hidden_size**2 + 3 * a.hidden_size
    assert PUBLISHED[name] + prediction == parameters


def test_math_models_rotate_with_their_own_base() -> None:
    assert find_architecture("qwen2.5-math-7b").rope_theta == 1e4
    assert find_architecture("qwen2.5-7b").rope_theta == 1e6


def test_biases_of_qwen2_need_no_field() -> None:
    found = parse_architecture(known_config("qwen2.5-0.5b"), "config.json")
    assert (found.qkv_bias, found.qk_norm, found.head_dim, found.tied_embeddings) == (True, False, 64, True)
    with pytest.raises(ValueError, match="use_sliding_window = True is not supported; only False is"):
        parse_architecture(known_config("qwen2.5-0.5b") | {"use_sliding_window": True}, "config.json")
