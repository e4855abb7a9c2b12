"""Every family is converted to Megatron's format and back without a changed bit."""

from pathlib import Path

import pytest
import torch

from minpro_megatron.conversion.convert import to_hf, to_megatron
from tests.mesh.reference import FAMILIES
from tests.support.hf_models import Watch, assert_same_files, make_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_random_bits_comes_back(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", FAMILIES[family].to_dict(), dtype, num_files=3)
    to_megatron(hf, tmp_path / "megatron", Watch(), verify=True)
    to_hf(tmp_path / "megatron", tmp_path / "back", Watch(), verify=True)
    assert_same_files(tmp_path / "back", hf)
