"""The checks of Transformer Engine, around a stand-in for the package: they pass, and each fails for a planted defect.

The stand-in logs what Transformer Engine logs of its choice of kernels.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.stand_in_process import run_with_stand_in

# a process of its own that takes a minute to import
pytestmark = [pytest.mark.mesh, pytest.mark.long, pytest.mark.timeout(600)]

CHECKS = ("attention", "agreement", "counts", "resume")


def with_stand_in() -> dict[str, list[str]]:
    """The problems of every case by its name, in one process: it takes seconds to start."""
    found = {f"{name} as it is": run_mesh(_run, f"transformer_engine_{name}")[0] for name in CHECKS}
    found["fusions as it is"] = run_mesh(_run, "fusions")[0]
    found["slice as it is"] = run_mesh(_run, "model_slice")[0]
    for name, defect in DEFECTS.items():
        found[name] = run_mesh(defect)[0]
    return found


def _run(mesh: Mesh, module: str, kernels: str = "FusedAttention", **options: Any) -> list[str]:
    from importlib import import_module

    import transformer_engine.pytorch as te  # the stand-in

    forward = te.DotProductAttention.forward

    def logged(self: Any, *arguments: Any, **settings: Any) -> Any:
        if kernels:
            logging.getLogger("DotProductAttention").info("Running with %s backend (sub-backend 1)", kernels)
        return forward(self, *arguments, **settings)

    te.DotProductAttention.forward = logged  # type: ignore[method-assign]
    check = import_module(f"minpro_megatron.gpu_checks.{module}")
    shapes, limits = check.SMALL
    outcome = check.check(mesh, replace(shapes, backend="transformer_engine"), limits, **options)
    return [problem.split()[0] for problem in outcome.problems]


def _unfused(mesh: Mesh) -> list[str]:
    return _run(mesh, "transformer_engine_attention", kernels="UnfusedDotProductAttention")


def _nothing_logged(mesh: Mesh) -> list[str]:
    return _run(mesh, "transformer_engine_attention", kernels="")


def _another_norm(mesh: Mesh) -> list[str]:
    from tests.mesh import transformer_engine_stand_in as stand_in

    right = stand_in._rms_norm
    stand_in._rms_norm = lambda hidden, weight, eps: right(hidden, weight, 0.5)
    return _run(mesh, "transformer_engine_agreement")


def _slow_first_pass(mesh: Mesh) -> list[str]:
    from minpro_megatron.gpu_checks.meter import Meter

    class Slow(Meter):
        calls = 0

        def seconds(self, work: Callable[[], object]) -> float:
            self.calls += 1
            super().seconds(work)
            return 30.0 if self.calls % 2 else 0.1

    return _run(mesh, "transformer_engine_counts", meter=Slow(mesh.device))


def _a_fusion_that_is_wrong(mesh: Mesh) -> list[str]:
    """On a CPU nothing is fused: the second variant only pretends to compute something else."""
    from minpro_megatron.actor.policy import Policy

    policy: Any = Policy
    score, calls = policy.score, []

    def changed(self: Any, sequences: Any) -> Any:
        calls.append(self)
        return score(self, sequences) + (0.1 if len(calls) == 2 else 0.0)

    policy.score = changed
    return _run(mesh, "fusions")


def _count_not_restored(mesh: Mesh) -> list[str]:
    from minpro_megatron.checkpoints import training_state

    training_state._set_steps = lambda one, step: None  # type: ignore[assignment]
    return _run(mesh, "transformer_engine_resume")


DEFECTS: dict[str, Callable[[Mesh], list[str]]] = {
    "unfused": _unfused,
    "nothing logged": _nothing_logged,
    "another norm": _another_norm,
    "slow first pass": _slow_first_pass,
    "wrong fusion": _a_fusion_that_is_wrong,
    "count not restored": _count_not_restored,
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    return run_with_stand_in(f"{__name__}:with_stand_in", deadline_s=500)


@pytest.mark.parametrize("name", [*CHECKS, "fusions", "slice"])
def test_the_check_passes(name: str, found: dict[str, list[str]]) -> None:
    assert found[f"{name} as it is"] == []


@pytest.mark.parametrize(
    ("defect", "problem"),
    [
        ("unfused", "unfused_choices"),
        ("nothing logged", "choices_logged"),
        ("another norm", "mean_score_difference"),
        ("slow first pass", "largest_first_pass_s"),
        ("wrong fusion", "mean_score_difference"),
        ("count not restored", "continued_error"),
    ],
)
def test_the_check_fails(defect: str, problem: str, found: dict[str, list[str]]) -> None:
    assert problem in found[defect]
