"""A float8 release becomes the folder in bfloat16 that a loop over its values gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minpro_megatron.conversion.convert import to_megatron
from minpro_megatron.conversion.dequantize import dequantize
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.weights.table import entries
from tests.mesh.reference import FAMILIES
from tests.support.hf_models import Watch, write_tensors

BLOCK = (8, 6)  # odd for most weights: the last blocks are parts
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}


def release(folder: Path, num_files: int = 2, scale_dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """The projections in float8; norms, embedding and router as they are."""
    folder.mkdir()
    config = FAMILIES["glm"].to_dict() | {"dtype": "bfloat16", "quantization_config": FP8}
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain))
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for entry in entries(read_architecture(folder)):
        for name, shape in zip(entry.hf, entry.shapes, strict=True):
            values = torch.randn(shape, generator=generator) * 30
            if not name.endswith("_proj.weight"):
                tensors[name] = values.to(entry.dtype(torch.bfloat16))
                continue
            tensors[name] = values.to(torch.float8_e4m3fn)
            blocks = [-(-size // block) for size, block in zip(shape, BLOCK, strict=True)]
            scales = torch.rand(blocks, generator=generator) * 1e-3 + 1e-5
            tensors[name + "_scale_inv"] = scales.to(scale_dtype)
    write_tensors(folder, tensors | changes.pop("tensors", {}), num_files)
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def loop(values: Tensor, scales: Tensor) -> np.ndarray:
    """float32 [rows, columns]: each product in float64, then rounded."""
    wide, found = values.double().numpy(), np.empty(values.shape, np.float32)
    for row, column in np.ndindex(*values.shape):
        found[row, column] = wide[row, column] * float(scales[row // BLOCK[0], column // BLOCK[1]])
    return found


def read_all(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("piece_bytes", [1, 1 << 24])
def test_every_value_is_multiplied_by_the_scale_of_its_block(
    scale_dtype: torch.dtype, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minpro_megatron.conversion.dequantize.PIECE_BYTES", piece_bytes)
    hf, watch = release(tmp_path / "hf", scale_dtype=scale_dtype), Watch()
    dequantize(hf, tmp_path / "plain", watch)
    given, found = read_all(hf), read_all(tmp_path / "plain")
    assert found.keys() == {name for name in given if not name.endswith("_scale_inv")}
    for name, tensor in found.items():
        if name + "_scale_inv" in given:
            expected = torch.from_numpy(loop(given[name], given[name + "_scale_inv"])).bfloat16()
        else:
            expected = given[name]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected), name
    assert watch.jobs["writing"] == [sum(tensor.nbytes for tensor in found.values())] * 2
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    to_megatron(tmp_path / "plain", tmp_path / "megatron", Watch(), verify=True)


PROJECTION = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": None}, "there is no quantization_config, so there is nothing to dequantize"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method = 'awq' cannot be deq"),
        ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "quantization_config.fmt = 'e5m2' cannot be dequantized"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size = None must be the rows and columns"),
        (
            {"tensors": {PROJECTION + "_scale_inv": torch.ones(3, 3)}},
            rf"{PROJECTION}_scale_inv has the shape \(3, 3\), which is not that of blocks of 8 x 6",
        ),
        (
            {"tensors": {PROJECTION + "_scale_inv": torch.ones(3, 3).half()}},
            f"{PROJECTION}_scale_inv is F16, but only scales in float32 or bfloat16 are read; use the release in bf",
        ),
        ({"tensors": {"other_scale_inv": torch.ones(3, 3)}}, "other_scale_inv belongs to no F8_E4M3 tensor"),
        (
            {"tensors": {"model.norm.weight": torch.zeros(44).to(torch.float8_e4m3fn)}},
            "model.norm.weight is F8_E4M3 without model.norm.weight_scale_inv; download the folder again",
        ),
        ({"tensors": {"model.norm.weight": torch.zeros(44).half()}}, "model.norm.weight is F16, which is not deq"),
        ({"tensors": {"model.x": torch.zeros(1)}}, "1 tensors are not in the table of Glm4MoeForCausalLM: model.x"),
    ],
    ids=str,
)
def test_what_is_no_such_release_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    hf = release(tmp_path / "hf", num_files=1, **changes)
    with pytest.raises(ValueError, match=message):
        dequantize(hf, tmp_path / "plain", Watch())
    assert not (tmp_path / "plain").exists()


def test_without_the_command_the_folder_is_refused_with_its_name(tmp_path: Path) -> None:
    hf = release(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"quant_method = 'fp8': .*or `minpro convert dequantize`"):
        to_megatron(hf, tmp_path / "megatron", Watch())
