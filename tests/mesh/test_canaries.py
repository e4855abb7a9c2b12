"""The trainer's log-probs of the servers' canaries: several prompts in one pass."""

from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.reference import make_model, make_sequences
from tests.mesh.steps import loaded_policy, step_config

pytestmark = pytest.mark.mesh


def _scores(mesh: Mesh, hf_path: str) -> tuple[list[np.ndarray], np.ndarray]:
    _, policy = loaded_policy(mesh, step_config({"tensor": 2}, row_tokens=64), hf_path)
    sequences = make_sequences(5, 12)
    pairs = [(one.prompt_ids.tolist(), one.response_ids.tolist()) for one in sequences]
    return policy.score_canaries(pairs), policy.score(sequences)


def test_canaries_are_scored_as_any_other_sequence(tmp_path: Path) -> None:
    make_model("moe").save_pretrained(tmp_path)
    lengths = [len(one.response_ids) for one in make_sequences(5, 12)]
    for canaries, expected in run_mesh(_scores, str(tmp_path), tensor=2):
        assert [len(one) for one in canaries] == lengths
        np.testing.assert_allclose(np.concatenate(canaries), expected, atol=1e-6)
