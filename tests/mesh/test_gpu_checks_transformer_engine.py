"""The checks of Transformer Engine, around a stand-in for the package: they pass, and each fails for a planted defect.

The stand-in logs what Transformer Engine logs of its choice of kernels.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from minpro_megatron.gpu_checks.outcome import Outcome
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.stand_in_process import run_with_stand_in

# a process of its own that takes a minute to import
pytestmark = [pytest.mark.mesh, pytest.mark.long, pytest.mark.timeout(600)]

CHECKS = ("attention", "agreement", "counts", "resume")


def with_stand_in() -> dict[str, Outcome]:
    """The outcome of every case by its name, in one process: it takes seconds to start."""
    found = {f"{name} as it is": run_mesh(_run, f"transformer_engine_{name}")[0] for name in CHECKS}
    found["fusions as it is"] = run_mesh(_fusions)[0]
    found["slice as it is"] = run_mesh(_run, "model_slice")[0]
    for name, defect in DEFECTS.items():
        found[name] = run_mesh(defect)[0]
    return found


def _run(mesh: Mesh, module: str, kernels: str = "FusedAttention", **options: Any) -> Outcome:
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
    return check.check(mesh, replace(shapes, backend="transformer_engine"), limits, **options)


def _fusions(mesh: Mesh) -> Outcome:
    """On a CPU the backend switches no fusion on. The stand-in has one of them: sums of gradients in products."""
    from minpro_megatron.actor.backends.transformer_engine_backend import TransformerEngineLayers

    layers: Any = TransformerEngineLayers
    settings = layers.settings
    layers.settings = lambda self, mixture: settings(self, mixture) | {"gradient_accumulation_fusion": True}
    return _run(mesh, "fusions")


def _unfused(mesh: Mesh) -> Outcome:
    return _run(mesh, "transformer_engine_attention", kernels="UnfusedDotProductAttention")


def _nothing_logged(mesh: Mesh) -> Outcome:
    return _run(mesh, "transformer_engine_attention", kernels="")


def _another_norm(mesh: Mesh) -> Outcome:
    from tests.mesh import transformer_engine_stand_in as stand_in

    right = stand_in._rms_norm
    stand_in._rms_norm = lambda hidden, weight, eps: right(hidden, weight, 0.5)
    return _run(mesh, "transformer_engine_agreement")


def _slow_first_pass(mesh: Mesh) -> Outcome:
    from minpro_megatron.gpu_checks.meter import Meter

    class Slow(Meter):
        calls = 0

        def seconds(self, work: Callable[[], object]) -> float:
            self.calls += 1
            super().seconds(work)
            return 30.0 if self.calls % 2 else 0.1

    return _run(mesh, "transformer_engine_counts", meter=Slow(mesh.device))


def _a_fusion_that_is_wrong(mesh: Mesh) -> Outcome:
    """The second variant pretends to compute other scores."""
    from minpro_megatron.actor.policy import Policy

    policy: Any = Policy
    score, calls = policy.score, []

    def changed(self: Any, *arguments: Any) -> Any:
        calls.append(self)
        return score(self, *arguments) + (0.1 if len(calls) == 2 else 0.0)

    policy.score = changed
    return _fusions(mesh)


def _only_the_last_micro_batch(mesh: Mesh) -> Outcome:
    """A fused product that puts every micro-batch's gradient in the place of the one before it."""
    from tests.mesh import transformer_engine_stand_in as stand_in

    product: Any = stand_in._product

    def replacing(module: Any, hidden: Any, weight: Any, is_first: Any) -> Any:
        return product(module, hidden, weight, is_first or isinstance(module, stand_in.LayerNormLinear))

    stand_in._product = replacing
    return _fusions(mesh)


def _one_wrong_gradient(mesh: Mesh) -> Outcome:
    """The values of one norm's gradient change places: no norm of a gradient tells."""
    from minpro_megatron.actor.policy import Policy

    policy: Any = Policy
    accumulate = policy.accumulate_gradient

    def changed(self: Any, *arguments: Any, **options: Any) -> Any:
        found = accumulate(self, *arguments, **options)
        if self._config.model.backend == "transformer_engine":
            weight = self.modules[0].decoder.layers[1].self_attention.q_layernorm.weight
            weight.main_grad.copy_(weight.main_grad.roll(1))
        return found

    policy.accumulate_gradient = changed
    return _run(mesh, "transformer_engine_agreement")


def _count_not_restored(mesh: Mesh) -> Outcome:
    from minpro_megatron.checkpoints import training_state

    training_state._set_steps = lambda one, step: None  # type: ignore[assignment]
    return _run(mesh, "transformer_engine_resume")


DEFECTS: dict[str, Callable[[Mesh], Outcome]] = {
    "unfused": _unfused,
    "nothing logged": _nothing_logged,
    "another norm": _another_norm,
    "one wrong gradient": _one_wrong_gradient,
    "slow first pass": _slow_first_pass,
    "wrong fusion": _a_fusion_that_is_wrong,
    "only the last micro-batch": _only_the_last_micro_batch,
    "count not restored": _count_not_restored,
}


@pytest.fixture(scope="module")
def found() -> dict[str, Outcome]:
    return run_with_stand_in(f"{__name__}:with_stand_in", deadline_s=500)


def _broken(outcome: Outcome) -> list[str]:
    """The names of the figures that are beyond their limits."""
    return [problem.split()[0] for problem in outcome.problems]


@pytest.mark.parametrize("name", [*CHECKS, "fusions", "slice"])
def test_the_check_passes(name: str, found: dict[str, Outcome]) -> None:
    assert found[f"{name} as it is"].problems == []


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
def test_the_check_fails(defect: str, problem: str, found: dict[str, Outcome]) -> None:
    assert problem in _broken(found[defect])


def test_a_wrong_gradient_fails_the_agreement_although_all_norms_agree(found: dict[str, Outcome]) -> None:
    outcome = found["one wrong gradient"]
    assert _broken(outcome) == ["gradient_error"]
    assert outcome.figures["worst_gradient"] == "decoder.layers.1.self_attention.q_layernorm.weight"


def test_a_product_that_does_not_add_up_micro_batches_fails_the_fusions(found: dict[str, Outcome]) -> None:
    outcome = found["only the last micro-batch"]
    assert "gradient_error" in _broken(outcome)
    assert float(outcome.figures["gradient_error"] or 0) > 0.5
    # all on, where the defect is, is what the others are compared with
    variant, _, parameter = str(outcome.figures["worst_gradient"]).partition(": ")
    assert variant in ("off", "without_gradient_accumulation_fusion")
    assert parameter == "decoder.layers.0.self_attention.linear_qkv.weight"
