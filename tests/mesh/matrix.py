"""Every factorisation of up to eight ranks that the models allow, packed and not: `make test-matrix`.

Not collected by `make test`, which tries a few of them (test_mesh_invariance.py). What is found goes into
matrix_result.md case by case, so an interrupted run can be taken up again (`make test-matrix RESUME=1`).
"""

import os
import time
from pathlib import Path

import pytest

from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.matrix_table import Row, read_rows, write_rows
from tests.mesh.meshes import Degrees, allowed_degrees
from tests.mesh.ragged_batch import SHORTEST_ROW, in_order, shuffled
from tests.mesh.reference import ReferenceStep, minpro_loss, model_architecture, reference_step
from tests.mesh.steps import (
    LEARNING_RATE,
    MAX_GRADIENT,
    MAX_LOSS,
    MAX_NORM,
    MAX_UPDATE,
    TEMPERATURE,
    Differences,
    differences,
    step_config,
    take_steps,
)

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(300)]

RESULT = Path(__file__).with_name("matrix_result.md")
LIMITS = f"{MAX_LOSS:.0e}, {MAX_NORM:.0e}, {MAX_GRADIENT:.0e} and {MAX_UPDATE:.0e}"
MESHES = [(kind, degrees) for kind in ("moe", "dense") for degrees in allowed_degrees(model_architecture(kind))]
PACKING = ("packed", "unpacked")


@pytest.fixture(scope="module")
def expected(starts: dict[str, Start]) -> dict[str, ReferenceStep]:
    optimizer, loss = step_config({}).optimizer, minpro_loss("token_mean")
    return {
        kind: reference_step(
            starts[kind].model, in_order(starts[kind].groups), loss, TEMPERATURE, LEARNING_RATE, optimizer
        )
        for kind in ("moe", "dense")
    }


@pytest.mark.parametrize(("kind", "degrees"), MESHES, ids=str)
def test_step_equals_transformers(kind: str, degrees: Degrees, starts: dict, expected: dict) -> None:
    recorded = read_rows(RESULT)
    if os.environ.get("MATRIX_RESUME") and all((kind, str(degrees), packing) in recorded for packing in PACKING):
        pytest.skip("recorded")
    start, parallel, place = starts[kind], degrees.as_settings, MESHES.index((kind, degrees))
    layouts = [
        (
            step_config(parallel, packing=packing == "packed", row_tokens=SHORTEST_ROW * (1 + place % 3)),
            shuffled(start.groups, seed=place),
        )
        for packing in PACKING
    ]
    began = time.monotonic()
    steps = run_mesh(take_steps, start.hf_path, layouts, deadline_s=240, **parallel)[0]
    seconds = time.monotonic() - began
    found = [differences(step, expected[kind]) for step in steps]
    rows = [_row(kind, degrees, packing, one, seconds) for packing, one in zip(PACKING, found, strict=True)]
    write_rows(RESULT, recorded | {row.key: row for row in rows}, len(MESHES) * len(PACKING), LIMITS)
    assert [one.breaches for one in found] == [[], []]


def _row(kind: str, degrees: Degrees, packing: str, found: Differences, seconds: float) -> Row:
    return Row(
        model=kind,
        mesh=str(degrees),
        ranks=str(degrees.num_ranks),
        packing=packing,
        loss=f"{found.loss:.1e}",
        grad_norm=f"{found.grad_norm:.1e}",
        gradient=f"{found.gradient:.1e}",
        worst_tensor=found.worst_tensor,
        update=f"{found.update:.1e}",
        seconds=f"{seconds:.1f}",
    )
