"""Both spellings of a scaled rotation are read, and its angles are those of transformers, bit by bit."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from minpro_megatron.models.architecture import Architecture, parse_architecture
from minpro_megatron.models.known_models.find import known_config
from minpro_megatron.models.rope_scaling import RopeScaling
from minpro_megatron.weights.rotary import inverse_frequencies

LLAMA = known_config("llama-3.1-8b")
QWEN3 = known_config("qwen3-8b")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def parsed(config: dict[str, Any], **changes: Any) -> Architecture:
    return parse_architecture({**config, **changes}, "config.json")


def test_the_released_llama_is_read() -> None:
    found = parsed(LLAMA)
    assert found.rope_scaling == RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    assert (found.rope_theta, found.qk_norm, found.qkv_bias, found.head_dim) == (5e5, False, False, 128)
    assert found.rope_scaling is not None
    assert found.rope_scaling.attention_factor == 1


def test_yarn_is_read_with_the_bounds_that_are_the_default() -> None:
    found = parsed(QWEN3, rope_scaling={"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}})
    assert found.rope_scaling == RopeScaling("yarn", 4.0, 32768, 1.0, 32.0)
    assert found.rope_scaling is not None
    assert found.rope_scaling.attention_factor == pytest.approx(1.138629, abs=1e-6)


@pytest.mark.parametrize(("config", "scaling"), [(LLAMA, LLAMA["rope_scaling"]), (QWEN3, YARN), (QWEN3, {})])
def test_both_spellings_say_the_same(config: dict[str, Any], scaling: dict[str, Any]) -> None:
    early = parsed(config, rope_scaling=scaling or None)
    late = {key: value for key, value in config.items() if not key.startswith("rope_")}
    late["rope_parameters"] = {"rope_type": "default", **scaling, "rope_theta": config["rope_theta"]}
    assert parsed(late) == early
    both = parsed(late, rope_scaling=late["rope_parameters"])  # as a program may write that knows both
    assert both == early


CASES: list[tuple[type, dict[str, Any], int, float]] = [
    (LlamaConfig, LLAMA["rope_scaling"], 128, 5e5),
    (LlamaConfig, LLAMA["rope_scaling"] | {"factor": 32.0}, 64, 5e5),
    (LlamaConfig, LLAMA["rope_scaling"] | {"original_max_position_embeddings": 40}, 10, 300.5),
    (Qwen3Config, YARN, 128, 1e6),
    (Qwen3Config, YARN | {"factor": 2.5, "beta_fast": 16.0, "beta_slow": 2.0}, 64, 1e4),
    (Qwen3Config, YARN | {"original_max_position_embeddings": 40}, 10, 300.5),
    (Qwen3Config, YARN | {"original_max_position_embeddings": 2}, 8, 1e4),  # both bounds in the same place
]


@pytest.mark.parametrize(("kind", "scaling", "head_dim", "theta"), CASES)
def test_angles_are_those_of_transformers(kind: type, scaling: dict[str, Any], head_dim: int, theta: float) -> None:
    theirs = kind(head_dim=head_dim, rope_parameters=scaling | {"rope_theta": theta})
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs)
    base = LLAMA if kind is LlamaConfig else QWEN3
    ours = parsed(base, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    assert torch.equal(inverse_frequencies(ours), expected)
    assert ours.rope_scaling is not None
    assert ours.rope_scaling.attention_factor == factor


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "linear", "factor": 2.0},
            "rope_type = 'linear' is not supported; only default, llama3 and yarn",
        ),
        ({"rope_type": 3}, "rope_type = 3 must be a text"),
        ({**YARN, "factor": 0.5}, "factor = 0.5 must be 1 or more"),
        ({**YARN, "attention_factor": 1.2}, "attention_factor = 1.2 is not supported; only None is"),
        ({**YARN, "mscale": 1.0}, "mscale = 1.0 is not supported"),
        ({**YARN, "truncate": False}, "truncate = False is not supported; only True is"),
        ({**YARN, "beta_slow": 40.0}, "the bounds of the scaling, 40 and 32, must be in rising order"),
        ({"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings is missing"),
        ({"rope_type": "llama3", **{k: v for k, v in YARN.items() if k != "rope_type"}}, "low_freq_factor is missing"),
    ],
)
def test_other_scalings_are_refused_with_field_and_rule(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parsed(QWEN3, rope_scaling=rope)


def test_spellings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="rope_parameters and rope_scaling differ; remove the one that is wrong"):
        parsed(QWEN3, rope_scaling=YARN, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
