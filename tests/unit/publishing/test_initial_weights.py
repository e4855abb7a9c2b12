"""What the servers loaded is compared with what they receive, as far as both must be equal."""

import logging
import pickle
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch

from minpro_megatron.config.model import ModelConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.server import ServerConfig
from minpro_megatron.errors import WRONG_INPUT
from minpro_megatron.publishing.initial_weights import conversion_is_exact, refuse_other_weights, routers_are_exact
from minpro_megatron.publishing.sender import PublishError
from tests.mesh.reference import FAMILIES
from tests.support.hf_models import make_model, read_tensors, write_tensors
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


def make_glm(folder: Path, router_dtype: torch.dtype) -> str:
    """A GLM in bfloat16 with routers in `router_dtype`."""
    make_model(folder, FAMILIES["glm"].to_dict())
    tensors = read_tensors(folder)
    routers = {name: tensor.to(router_dtype) for name, tensor in tensors.items() if name.endswith("mlp.gate.weight")}
    assert len(routers) == 3
    write_tensors(folder, tensors | routers)
    return str(folder)


@pytest.mark.parametrize(
    ("router_dtype", "stored", "trained", "exact"),
    [
        (torch.bfloat16, "bfloat16", "bfloat16", True),
        (torch.bfloat16, "float32", "bfloat16", True),
        (torch.float32, "float32", "float32", True),
        (torch.float32, "bfloat16", "bfloat16", False),
        (torch.float32, "float32", "bfloat16", False),
        (torch.float32, "bfloat16", "float32", False),
    ],
)
def test_routers_that_servers_hold_in_float32(
    router_dtype: torch.dtype, stored: str, trained: str, exact: bool, tmp_path: Path
) -> None:
    assert routers_are_exact(make_glm(tmp_path / "hf", router_dtype), stored, trained) == exact


def config_of(folder: Path, dtype: str = "float32", served: Literal["float32", "bfloat16"] = "float32") -> RunConfig:
    """A trainer in `dtype`, of a checkpoint in float32, with servers in `served`."""
    write_example_files(folder)
    model = ModelConfig.model_construct(hf_path=str(folder / "hf"), megatron_path=str(folder / "megatron"), dtype=dtype)
    config = example_config(folder, server=ServerConfig(device="cpu", dtype=served))
    return config.model_copy(update={"model": model})


def test_other_weights_are_refused(tmp_path: Path) -> None:
    expected = r"checksum 5e after loading .*, 6f after .*publish\.at_start to false"
    with pytest.raises(PublishError, match=expected) as refused:
        refuse_other_weights(config_of(tmp_path), {1: "5e", 2: "7a"}, {1: "6f", 2: "7a"})
    assert refused.value.exit_status == WRONG_INPUT  # a job does not start the run again
    assert pickle.loads(pickle.dumps(refused.value)).exit_status == WRONG_INPUT  # on the other ranks


def test_equal_weights_and_sizes_that_were_not_there_are_fine(tmp_path: Path) -> None:
    refuse_other_weights(config_of(tmp_path), {1: "5e"}, {1: "5e", 2: "7a"})
    refuse_other_weights(config_of(tmp_path), {}, {1: "5e"})


def test_a_rounding_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        refuse_other_weights(config_of(tmp_path, "bfloat16"), {1: "5e"}, {1: "6f"})
    assert "the trainer's weights are rounded" in caplog.text


def test_a_rounding_of_the_routers_alone_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path, "bfloat16", "bfloat16")
    with pytest.raises(PublishError):  # the example's routers are rounded by both sides
        refuse_other_weights(config, {1: "5e"}, {1: "6f"})
    shutil.rmtree(tmp_path / "hf")
    make_glm(tmp_path / "hf", torch.float32)
    with caplog.at_level(logging.INFO):
        refuse_other_weights(config, {1: "5e"}, {1: "6f"})
    assert "the trainer's weights are rounded" in caplog.text
    shutil.rmtree(tmp_path / "hf")
    make_glm(tmp_path / "hf", torch.bfloat16)
    with pytest.raises(PublishError):
        refuse_other_weights(config, {1: "5e"}, {1: "6f"})
