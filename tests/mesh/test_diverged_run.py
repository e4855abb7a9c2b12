"""Three updates in a row without a finite gradient end the run, on every rank, with a diagnosis."""

from dataclasses import replace
from pathlib import Path

import pytest

from minpro_megatron.errors import RunFailed
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.reference import make_model, make_sequences
from tests.mesh.steps import loaded_model, step_config

pytestmark = pytest.mark.mesh


def _updates(mesh: Mesh, hf_path: str, broken: list[bool], parallel: dict[str, int]) -> str:
    """The message with which the run ended, "" if it did not."""
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.actor.updates import Updates

    config = step_config(parallel, row_tokens=128)
    architecture, chunks = loaded_model(mesh, hf_path)
    policy = Policy(config, architecture, chunks, mesh)
    updates = Updates(config, mesh, policy)
    sound = make_sequences(4, 12)
    for is_broken in broken:
        advantage = float("nan") if is_broken else 1.0
        result = policy.update([replace(sound[0], advantage=advantage), *sound[1:]], learning_rate=1e-6)
        try:
            updates.refuse_a_diverged_run(result, step=7)
        except RunFailed as error:
            return str(error)
    return ""


def test_the_third_broken_gradient_in_a_row_ends_the_run(tmp_path: Path) -> None:
    make_model("moe").save_pretrained(tmp_path)
    broken = [True, True, False, True, True, True]
    parallel = {"tensor": 2, "expert": 2}
    messages = run_mesh(_updates, str(tmp_path), broken, parallel, **parallel)
    assert messages[0] == messages[1]
    for part in ("global step 7", "3 times in a row", "Loss nan", "decoder.layers.0.", "learning_rate"):
        assert part in messages[0]
    assert run_mesh(_updates, str(tmp_path), broken[:5], parallel, **parallel) == ["", ""]


def test_a_frozen_bias_of_the_routers_is_not_asked_for_a_gradient(tmp_path: Path) -> None:
    make_model("glm").save_pretrained(tmp_path)
    (message,) = run_mesh(_updates, str(tmp_path), [True] * 3, {})
    assert "3 times in a row" in message
    assert "expert_bias" not in message
