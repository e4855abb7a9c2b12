"""Every family is converted to Megatron's format and back without a changed bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minpro_megatron.conversion.convert import to_hf, to_megatron
from tests.mesh.reference import FAMILIES
from tests.support.hf_models import Watch, assert_same_files, make_model, write_tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_random_bits_comes_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", FAMILIES[family].to_dict(), dtype, num_files=3)
    to_megatron(hf, tmp_path / "megatron", Watch(), verify=True)
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)
    assert_same_files(tmp_path / "back", hf)


def test_a_release_is_converted_without_its_prediction_layer(tmp_path: Path) -> None:
    config = FAMILIES["glm"].to_dict()
    hf = make_model(tmp_path / "hf", config)
    kept = load_file(hf / "model.safetensors")
    extra = {f"model.layers.{config['num_hidden_layers']}.eh_proj.weight": torch.ones(44, 88, dtype=torch.bfloat16)}
    write_tensors(hf, kept | extra)
    watch = Watch()
    assert to_megatron(hf, tmp_path / "megatron", watch, verify=True) == list(extra)
    assert watch.jobs["verifying"] == [sum(tensor.nbytes for tensor in kept.values())] * 2
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == kept.keys()
    assert all(tensor.view(torch.uint8).equal(kept[name].view(torch.uint8)) for name, tensor in back.items())


def test_the_bias_of_the_choice_of_experts_stays_float32(tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", FAMILIES["glm"].to_dict())
    narrow = load_file(hf / "model.safetensors")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    narrow[bias] = torch.tensor([0.5, -0.25, 1, 2, 3, 4], dtype=torch.bfloat16)
    write_tensors(hf, narrow)
    with pytest.raises(ValueError, match=f"{bias} is torch.bfloat16 and it must be torch.float32, and nothing is cast"):
        to_megatron(hf, tmp_path / "megatron", Watch())
    to_megatron(hf, tmp_path / "megatron", Watch(), verify=True, cast_to=torch.bfloat16)
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back[bias].equal(narrow[bias].float())
