"""What the servers loaded is compared with what they receive, as far as both must be equal."""

import logging
from pathlib import Path

import pytest

from minpro_megatron.config.model import ModelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.publishing.initial_weights import conversion_is_exact, refuse_other_weights
from minpro_megatron.publishing.sender import PublishError
from tests.support.run_examples import example_config, write_example_files


@pytest.mark.parametrize(
    ("stored", "trained", "served", "exact"),
    [
        ("float32", "float32", "float32", True),
        ("bfloat16", "bfloat16", "bfloat16", True),
        ("float32", "bfloat16", "bfloat16", True),  # both sides round once
        ("bfloat16", "float32", "bfloat16", True),
        ("float32", "bfloat16", "float32", False),  # the folder may be in float32
        ("bfloat16", "float32", "float32", False),
    ],
)
def test_where_nothing_is_rounded_on_one_way_only(stored: str, trained: str, served: str, exact: bool) -> None:
    assert conversion_is_exact(stored, trained, served) == exact


def config_of(folder: Path, dtype: str = "float32") -> RunConfig:
    """A trainer in `dtype`, of a checkpoint in float32, with servers in float32."""
    write_example_files(folder)
    model = ModelConfig.model_construct(hf_path=str(folder / "hf"), megatron_path=str(folder / "megatron"), dtype=dtype)
    config = example_config(folder, server=ServerConfig(device="cpu", dtype="float32"))
    return config.model_copy(update={"model": model})


def test_other_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=r"checksum 5e after loading .*, 6f after .*publish\.at_start to false"):
        refuse_other_weights(config_of(tmp_path), {1: "5e", 2: "7a"}, {1: "6f", 2: "7a"})


def test_equal_weights_and_sizes_that_were_not_there_are_fine(tmp_path: Path) -> None:
    refuse_other_weights(config_of(tmp_path), {1: "5e"}, {1: "5e", 2: "7a"})
    refuse_other_weights(config_of(tmp_path), {}, {1: "5e"})


def test_a_rounding_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        refuse_other_weights(config_of(tmp_path, "bfloat16"), {1: "5e"}, {1: "6f"})
    assert "the trainer's weights are rounded" in caplog.text
