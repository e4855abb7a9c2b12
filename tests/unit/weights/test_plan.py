"""A plan's figures by hand, and the tool that prints them. tests/mesh compares them with megatron-core's models."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import Qwen3ForCausalLM  # noqa: F401  imported here: the first time takes seconds

from minpro_megatron.commands import convert
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.weights.plan import make_plan, optimizer_degrees, parameters_of_stage, rank_kinds, stage_of_layer
from tests.support.hf_models import MIXTURE, make_model, read_tensors
from tests.support.released_configs import QWEN3_0_6B, QWEN3_8B, QWEN3_30B_A3B


def folder_with(tmp_path: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_config_alone_tells_tensors_and_parameters(tmp_path: Path) -> None:
    plan = make_plan(folder_with(tmp_path, QWEN3_8B), ParallelConfig(tensor=4, pipeline=2))
    assert (plan.hf_tensors_covered, plan.hf_tensors_missed, plan.hf_tensors_absent) == (399, [], [])
    assert plan.parameters == 8_190_735_360
    assert sum(kind.num_ranks for kind in plan.rank_kinds) == 8


def test_an_index_whose_files_were_not_downloaded_is_no_obstacle(tmp_path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00005.safetensors"}}
    (folder_with(tmp_path, QWEN3_8B) / "model.safetensors.index.json").write_text(json.dumps(index))
    assert make_plan(tmp_path, ParallelConfig()).parameters == 8_190_735_360


def test_the_bytes_are_those_of_mixed_precision_adam(tmp_path: Path) -> None:
    """Qwen3-30B-A3B on one pipeline stage: 128 experts of 3 * 768 * 2048 in 48 layers, over 8 expert ranks."""
    architecture = read_architecture(folder_with(tmp_path, QWEN3_30B_A3B))
    experts = 48 * 128 * 3 * 768 * 2048
    dense = 30_532_122_624 - experts
    (kind,) = rank_kinds(architecture, ParallelConfig(expert=8, data=16))
    assert (kind.num_ranks, kind.layers, kind.stages) == (16, 48, (0,))
    assert (kind.parameters, kind.expert_parameters) == (dense + experts // 8, experts // 8)
    assert (kind.weight_bytes, kind.gradient_bytes) == (2 * kind.parameters, 4 * kind.parameters)
    assert kind.optimizer_bytes == 12 * (dense // 16 + experts // 8 // 2)
    assert kind.total_bytes == kind.weight_bytes + kind.gradient_bytes + kind.optimizer_bytes


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ({"tensor": 4, "pipeline": 2, "expert": 8, "context": 2}, (2, 1)),
        ({"expert": 8}, (8, 1)),
        ({"expert": 8, "data": 32}, (32, 4)),
        ({"tensor": 2, "expert": 4, "expert_tensor": 2, "context": 2, "data": 8}, (16, 4)),
    ],
    ids=str,
)
def test_states_are_cut_over_the_ranks_that_hold_the_same(degrees: dict[str, Any], expected: tuple[int, int]) -> None:
    assert optimizer_degrees(ParallelConfig(**degrees)) == expected


def test_layers_are_dealt_to_stages_chunk_by_chunk() -> None:
    plain, interleaved = ParallelConfig(pipeline=2), ParallelConfig(pipeline=2, virtual_pipeline=2)
    assert [stage_of_layer(layer, 8, plain) for layer in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [stage_of_layer(layer, 8, interleaved) for layer in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    uneven = ParallelConfig(pipeline=2, virtual_pipeline=2, pipeline_layers=(1, 3, 2, 1))
    assert [stage_of_layer(layer, 7, uneven) for layer in range(7)] == [0, 1, 1, 1, 0, 0, 1]


def test_tensors_of_one_shape_may_be_cut_along_different_axes(tmp_path: Path) -> None:
    config = {**QWEN3_30B_A3B, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    config |= {"moe_intermediate_size": 128, "num_hidden_layers": 1, "num_experts": 2, "vocab_size": 128}
    config["num_experts_per_tok"] = 2
    architecture = read_architecture(folder_with(tmp_path, config))
    # an expert's down projection and the attention's output are both 64 x 128; the first is whole on a rank of its own
    _, experts = parameters_of_stage(architecture, ParallelConfig(tensor=2, expert=2), stage=0)
    assert experts == 3 * 64 * 128


def test_stages_are_grouped_by_what_they_hold(tmp_path: Path) -> None:
    architecture = read_architecture(folder_with(tmp_path, QWEN3_8B))
    first, middle, last = rank_kinds(architecture, ParallelConfig(pipeline=4))
    assert [kind.stages for kind in (first, middle, last)] == [(0,), (1, 2), (3,)]
    assert middle.num_ranks == 2
    embedding = 151_936 * 4096
    assert first.parameters - middle.parameters == embedding
    assert last.parameters - middle.parameters == embedding + 4096  # the output layer and the last norm


def test_a_tied_models_last_stage_holds_a_copy_of_the_embedding(tmp_path: Path) -> None:
    architecture = read_architecture(folder_with(tmp_path, QWEN3_0_6B))
    (whole,) = rank_kinds(architecture, ParallelConfig())
    assert whole.parameters == 596_049_920
    halves = rank_kinds(architecture, ParallelConfig(pipeline=2))
    assert sum(kind.parameters for kind in halves) == 596_049_920 + 151_936 * 1024


def test_weight_files_are_believed_before_the_config(tmp_path: Path) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    tensors = read_tensors(hf)
    tensors["model.layers.0.mlp.shared_expert.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, hf / "model.safetensors")
    plan = make_plan(hf, ParallelConfig())
    assert plan.hf_tensors_missed == ["model.layers.0.mlp.shared_expert.weight"]
    assert plan.hf_tensors_absent == ["model.norm.weight"]


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return convert.main([*map(str, arguments)])


def test_the_tool_prints_a_plan_as_table_and_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    assert run_tool(monkeypatch, "plan", "--hf", hf, "--parallel", "tensor=2,pipeline=2") == 0
    printed = capsys.readouterr().out
    assert "39 tensors covered, 0 missed, 0 absent" in printed
    assert "4 ranks: tensor 2, pipeline 2, data 1" in printed
    assert run_tool(monkeypatch, "plan", "--hf", hf, "--parallel", "tensor=2,pipeline=2", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["hf_tensors_covered"], plan["parallel"]["world_size"]) == (39, 4)
    assert {"parameters", "weight_bytes", "gradient_bytes", "optimizer_bytes"} <= plan["rank_kinds"][0].keys()
    (kind, _) = rank_kinds(read_architecture(hf), ParallelConfig(tensor=2, pipeline=2))
    assert f"{kind.parameters:,}" in printed


def test_stages_of_other_numbers_of_layers_are_other_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    hf = folder_with(tmp_path, {**QWEN3_30B_A3B, "num_hidden_layers": 7})
    uneven = "expert=8,pipeline=3,pipeline_layers=2+3+2"
    assert run_tool(monkeypatch, "plan", "--hf", hf, "--parallel", uneven, "--json") == 0
    kinds = json.loads(capsys.readouterr().out)["rank_kinds"]
    assert [(kind["stages"], kind["layers"]) for kind in kinds] == [([0], 2), ([1], 3), ([2], 2)]
    first, middle, last = (kind["parameters"] for kind in kinds)
    embedding, layer = 151_936 * 2048, middle // 3
    assert (first, last) == (2 * layer + embedding, 2 * layer + embedding + 2048)  # the last norm
    assert run_tool(monkeypatch, "plan", "--hf", hf, "--parallel", uneven) == 0
    assert "24 ranks: pipeline 3, expert 8, data 8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ("tensor=3", "--parallel tensor = 3 must divide the model's num_attention_heads = 4"),
        ("foo=2", "--parallel foo=2: there is no axis 'foo'; known: tensor, pipeline"),
        ("tensors=2", "there is no axis 'tensors' (did you mean tensor"),
        ("tensor", "--parallel tensor: tensor needs a whole number"),
        ("tensor=2,tensor=2", "--parallel tensor=2,tensor=2: tensor is given twice"),
        ("tensor=0", "--parallel tensor=0: tensor: Input should be greater than or equal to 1"),
        ("tensor=x", "--parallel tensor=x: tensor needs a whole number, such as tensor=2 (got 'x')"),
        ("pipeline=2,pipeline_layers=1+x", "pipeline_layers needs whole numbers, such as pipeline_layers=2+3"),
        ("pipeline=2,pipeline_layers=2+1", "pipeline_layers = 2+1 adds up to 3, but the model's layers = 2: give"),
        ("virtual_pipeline=2", "virtual_pipeline = 2 needs pipeline > 1"),
    ],
)
def test_a_wrong_mesh_is_one_line_and_status_2(
    parallel: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    assert run_tool(monkeypatch, "plan", "--hf", hf, "--parallel", parallel) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_tool_converts_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    hf = make_model(tmp_path / "hf", MIXTURE)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert run_tool(monkeypatch, "to-megatron", "--hf", hf, "--output", megatron, "--verify") == 0
    assert run_tool(monkeypatch, "to-hf", "--megatron", megatron, "--output", back) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [f"wrote {megatron}", f"wrote {back}"]
    assert "verifying" in captured.err
    assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert run_tool(monkeypatch, "to-hf", "--megatron", hf, "--output", back) == 2
    assert "there is no manifest.json" in capsys.readouterr().err
