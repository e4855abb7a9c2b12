"""Stages with different numbers of layers: the step is transformers', and weights and states pass between layouts."""

from pathlib import Path
from typing import Any

import pytest

from tests.mesh.conftest import Start
from tests.mesh.continued_training import resume, train_and_save
from tests.mesh.harness import run_mesh
from tests.mesh.passed_weights import assert_bit_equal, through_the_mesh
from tests.mesh.ragged_batch import in_order, ragged_groups, shuffled, smallest_routing_gap
from tests.mesh.reference import ReferenceStep, make_model, make_sequences, minpro_loss, reference_step, saved_tensors
from tests.mesh.steps import LEARNING_RATE, TEMPERATURE, differences, step_config, take_steps
from tests.support.long_cases import long_rows_after

pytestmark = pytest.mark.mesh

SEED = 16  # of thirty, that which leaves routing least to rounding
INTERLEAVED: dict[str, Any] = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": (1, 2, 1, 1)}
STEPS: list[tuple[str, dict[str, Any], bool]] = [
    ("moe of 5", {**INTERLEAVED, "context": 2, "expert": 2}, True),
    ("moe of 5", {"pipeline": 2, "pipeline_layers": (3, 2), "tensor": 2, "expert": 2}, True),
    ("moe of 5", {"pipeline": 3, "pipeline_layers": (1, 3, 1), "data": 2, "expert": 2}, False),
    ("tied of 3", {"pipeline": 2, "pipeline_layers": (1, 2), "tensor": 2}, True),
]
LAYOUTS: list[dict[str, Any]] = [{}, {"pipeline": 2, "pipeline_layers": (2, 3), "tensor": 2, "expert": 2}, INTERLEAVED]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Start, ReferenceStep]]:
    """Models whose layers no pipeline divides, and the step that a mesh must reproduce."""
    made = {}
    for kind in ("moe of 5", "tied of 3"):
        model, path = make_model(kind), tmp_path_factory.mktemp("odd")
        model.save_pretrained(path)
        start = Start(model, str(path), ragged_groups(model, TEMPERATURE, SEED))
        sequences, optimizer = in_order(start.groups), step_config({}).optimizer
        loss = minpro_loss("token_mean")
        made[kind] = start, reference_step(model, sequences, loss, TEMPERATURE, LEARNING_RATE, optimizer)
    mixture = made["moe of 5"][0]
    assert smallest_routing_gap(mixture.model, in_order(mixture.groups)) > 5e-5, "take another seed for the batch"
    return made


@pytest.mark.parametrize(("kind", "parallel", "packing"), long_rows_after(1, STEPS), ids=str)
def test_step_on_uneven_stages_equals_transformers(
    kind: str, parallel: dict[str, Any], packing: bool, odd: dict[str, tuple[Start, ReferenceStep]]
) -> None:
    start, expected = odd[kind]
    layout = (step_config(parallel, packing=packing), shuffled(start.groups, seed=1))
    step = run_mesh(take_steps, start.hf_path, [layout], **parallel)[0][0]
    assert differences(step, expected).breaches == []


@pytest.mark.long
def test_weights_saved_on_one_layout_load_on_every_other_and_publish_whole(odd: dict, tmp_path: Path) -> None:
    start = odd["moe of 5"][0]
    expected = {name: tensor.numpy() for name, tensor in saved_tensors(start.model).items()}
    checkpoint = tmp_path / "checkpoint"
    for place, layout in enumerate((LAYOUTS[1], LAYOUTS[2], LAYOUTS[0])):
        sources, save_to = ([None], checkpoint) if place == 0 else ([checkpoint], None)
        ranks = run_mesh(through_the_mesh, Path(start.hf_path), sources, save_to, **layout)
        assert_bit_equal([rank[0] for rank in ranks], expected)


@pytest.mark.long
def test_training_goes_on_from_one_layout_to_another(odd: dict, tmp_path: Path) -> None:
    hf_path, sequences = odd["moe of 5"][0].hf_path, make_sequences(8, 30)
    configs = [step_config(layout, row_tokens=128) for layout in LAYOUTS]
    saved = run_mesh(train_and_save, configs[2], hf_path, str(tmp_path), sequences, **LAYOUTS[2])[0]
    for layout, config in ((LAYOUTS[1], configs[1]), (LAYOUTS[0], configs[0])):
        found = run_mesh(resume, config, hf_path, str(tmp_path), sequences, **layout)[0]
        assert found["losses"] == pytest.approx(saved["losses"], rel=1e-5)
        assert found["norms"] == pytest.approx(saved["norms"], rel=1e-5)
