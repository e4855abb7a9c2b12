"""The checks that train: on a CPU with small shapes they pass, and each fails for a defect that is planted.

A defect is planted in the rank's own process.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.live_meter import GivenMeter, LiveMeter

pytestmark = pytest.mark.mesh

# Problems by check: the first word of each, which is the figure's name.
Problems = dict[str, list[str]]


def _words(outcome: Any) -> list[str]:
    return [problem.split()[0] for problem in outcome.problems]


def _run(mesh: Mesh, name: str, **options: Any) -> Any:
    from importlib import import_module

    module = import_module(f"minpro_megatron.gpu_checks.{name}")
    shapes, limits = module.SMALL
    return module.check(mesh, replace(shapes, **options.pop("shapes", {})), limits, **options)


def _all_pass(mesh: Mesh, names: list[str]) -> dict[str, Any]:
    from tests.support.offload_without_gpu import offload_works_here

    offload_works_here()
    found = {}
    for name in names:
        module, _, recompute = name.partition(" ")
        live = {"meter": LiveMeter(mesh.device), "shapes": {"recompute": recompute}} if recompute else {}
        found[name] = _run(mesh, module, **live)
    return found


@pytest.mark.parametrize(
    "names",
    [
        ["grouped_products", "routing_replay", "snapshots", "parked_memory", "optimizer_offload", "model_slice none"],
        pytest.param(["model_slice selective", "model_slice full"], marks=pytest.mark.long),
    ],
    ids=lambda names: names[-1],
)
def test_the_checks_pass_and_the_planned_bytes_are_those_that_live(names: list[str]) -> None:
    (found,) = run_mesh(_all_pass, names)
    assert {name: outcome.problems for name, outcome in found.items()} == {name: [] for name in names}
    for name in names:
        if name.startswith("model_slice"):
            assert 0.9 < found[name].figures["activation_bytes_over_plan"] < 1.1


def _slice_with(defect: str) -> Callable[[Mesh], Any]:
    def run(mesh: Mesh) -> Any:
        from minpro_megatron.actor.policy import Policy
        from minpro_megatron.gpu_checks import model_slice

        shapes, _ = model_slice.SMALL
        plan = model_slice._plan(shapes.config("cpu"), shapes)
        held, peak, waits = [100, 100 + plan.states], plan.activations.peak, 8
        policy: Any = Policy
        if defect == "other scores":
            score = policy.score
            policy.score = lambda self, sequences: score(self, sequences) + 0.3
        elif defect == "leaked states":
            held[1] += plan.states // 10
        elif defect == "leaked activations":
            peak += peak // 4
        elif defect == "waits":
            waits = 40
        elif defect == "no update":
            policy.update = _without_step(policy.update)
        return _run(mesh, "model_slice", meter=GivenMeter(held, peak, waits))

    return run


def _without_step(update: Callable) -> Callable:
    def without_step(self: Any, *arguments: Any, **options: Any) -> Any:
        return replace(update(self, *arguments, **options), skipped="gradient not finite")

    return without_step


def _slices(mesh: Mesh, defect: str) -> Any:
    return _slice_with(defect)(mesh)


@pytest.mark.parametrize(
    ("defect", "problems"),
    [
        pytest.param("none", [], marks=pytest.mark.long),
        ("other scores", ["start"]),
        pytest.param("leaked states", ["state_bytes_over_plan"], marks=pytest.mark.long),
        ("leaked activations", ["activation_bytes_over_plan"]),
        pytest.param("waits", ["host_waits_per_layer_and_row"], marks=pytest.mark.long),
        pytest.param("no update", ["the"], marks=pytest.mark.long),
    ],
)
def test_a_slice_fails(defect: str, problems: list[str]) -> None:
    (outcome,) = run_mesh(_slices, defect)
    assert _words(outcome) == problems, outcome.problems


def _experts_of_the_next(mesh: Mesh) -> Any:
    """Without tokens of its own an expert takes those of the next one."""
    from minpro_megatron.actor.backends.torch_backend import GroupedExperts

    def wrong(experts: Any, rows: Any, counts: Any, probs: Any) -> Any:
        if 0 < int((counts == 0).sum()) < len(counts):
            counts = counts.roll(-1)
        return GroupedExperts.forward(experts, rows, counts, probs)

    return _run(mesh, "grouped_products", grouped=wrong)


def _garbage_in_empty_experts(mesh: Mesh) -> Any:
    """Leaves what an uninitialised gradient of an expert without tokens may be."""
    from minpro_megatron.actor.backends.torch_backend import GroupedExperts

    def wrong(experts: Any, rows: Any, counts: Any, probs: Any) -> Any:
        output, bias = GroupedExperts.forward(experts, rows, counts, probs)
        weight = experts.local_experts[int(counts.argmin())].linear_fc1.weight
        return output + (1e-30 * weight.sum() if int(counts.min()) == 0 else 0), bias

    return _run(mesh, "grouped_products", grouped=wrong)


@pytest.mark.long
def test_grouped_products_fail_for_experts_without_tokens() -> None:
    for function in (_experts_of_the_next, _garbage_in_empty_experts):
        (outcome,) = run_mesh(function)
        assert _words(outcome) == ["largest_error"]
        assert outcome.figures["even_error"] < 1e-5, "only where an expert has no tokens"


def _routes_not_followed(mesh: Mesh) -> Any:
    from contextlib import nullcontext

    from minpro_megatron.actor.routing import ReplayedRouting

    replayed: Any = ReplayedRouting
    replayed.around = lambda self, chunk, micro_batch, num_slots: nullcontext()
    return _run(mesh, "routing_replay")


@pytest.mark.long
def test_replay_fails_if_the_routers_choose() -> None:
    (outcome,) = run_mesh(_routes_not_followed)
    assert "score_passes_on_other_experts" in _words(outcome)


def _snapshots_with(mesh: Mesh, defect: str) -> Any:
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.host_memory.snapshots import WeightSnapshots

    snapshots: Any = WeightSnapshots
    policy: Any = Policy
    if defect == "not swapped in":
        snapshots._copy_in = lambda self, values: None
    elif defect == "not swapped out":
        copy_in, calls = snapshots._copy_in, []

        def once(self: Any, values: Any) -> None:
            calls.append(1)
            if len(calls) == 1:
                copy_in(self, values)

        snapshots._copy_in = once
    elif defect == "not loaded":
        policy.load = lambda self, folder: 0
    elif defect == "moments lost":
        load = policy.load

        def load_without_moments(self: Any, folder: Any) -> int:
            count = load(self, folder)
            for part in self._optimizer.chained_optimizers:
                for state in part.optimizer.state.values():
                    state["exp_avg"].mul_(-1)
            return count

        policy.load = load_without_moments
    return _run(mesh, "snapshots")


@pytest.mark.long
@pytest.mark.parametrize(
    ("defect", "problems"),
    [
        ("not swapped in", ["snapshot_weights_different"]),
        pytest.param(
            "not swapped out", ["current_weights_different", "loaded_weights_different"], marks=pytest.mark.long
        ),
        pytest.param(
            "not loaded",
            ["loaded_weights_different", "loaded_updates_error", "next_update_error"],
            marks=pytest.mark.long,
        ),
        ("moments lost", ["next_update_error"]),
    ],
)
def test_snapshots_and_checkpoints_fail(defect: str, problems: list[str]) -> None:
    (outcome,) = run_mesh(_snapshots_with, defect)
    assert _words(outcome) == problems


def _parked_with(mesh: Mesh, defect: str) -> Any:
    from minpro_megatron.gpu_checks import parked_memory
    from minpro_megatron.host_memory.parked_storages import ParkedStorages
    from minpro_megatron.host_memory.trainer_memory import TrainerMemory
    from minpro_megatron.planning.memory import state_bytes

    parked: Any = ParkedStorages
    memory: Any = TrainerMemory
    shapes, _ = parked_memory.SMALL
    planned = sum(state_bytes(shapes.config("cpu"), shapes.architecture(), 0)[:3])
    left, kept = 0, 0
    if defect == "a byte changes":
        back = parked.to_device

        def changed(self: Any) -> None:
            for host in self._host[:1]:
                host[:1].add_(1)
            back(self)

        parked.to_device = changed
    elif defect == "moments stay":
        memory._state_tensors = lambda self: iter(())
    elif defect == "gradients stay":
        left = planned // 4
    elif defect == "the allocator keeps it":
        kept = planned
    meter = GivenMeter(held=[100, 100 + left], reserved=[200, 200 + kept])
    return _run(mesh, "parked_memory", meter=meter)


@pytest.mark.long
@pytest.mark.parametrize(
    ("defect", "problems"),
    [
        ("none", []),
        ("a byte changes", ["weights_different"]),
        ("moments stay", ["moved_bytes_over_plan"]),
        ("gradients stay", ["left_bytes_over_plan"]),
        ("the allocator keeps it", ["kept_by_allocator_over_plan"]),
    ],
)
def test_parked_memory_fails(defect: str, problems: list[str]) -> None:
    (outcome,) = run_mesh(_parked_with, defect)
    assert _words(outcome) == problems, outcome.problems


def _offload_with(mesh: Mesh, defect: str) -> Any:
    from minpro_megatron.gpu_checks import optimizer_offload
    from minpro_megatron.planning.memory import state_bytes
    from tests.support.offload_without_gpu import offload_works_here

    offload_works_here()
    shapes, _ = optimizer_offload.SMALL
    config = optimizer_offload._in_bfloat16(shapes.config("cpu"))
    planned = state_bytes(config, shapes.architecture(), 0)[2]
    if defect == "another moment":
        with_offload = optimizer_offload._with_offload

        def changed(config: Any, fraction: float) -> Any:
            made = with_offload(config, fraction)
            beta1 = 0.1 if fraction else made.optimizer.beta1
            return made.model_copy(update={"optimizer": made.optimizer.model_copy(update={"beta1": beta1})})

        optimizer_offload._with_offload = changed  # type: ignore[assignment]
    saved = planned if defect != "stays on the device" else planned // 2
    meter = GivenMeter(held=[0, 10 * planned, 0, 10 * planned - saved])
    return _run(mesh, "optimizer_offload", meter=meter)


@pytest.mark.long
@pytest.mark.parametrize(
    ("defect", "problems"),
    [
        pytest.param("none", [], marks=pytest.mark.long),
        ("another moment", ["update_error"]),
        pytest.param("stays on the device", ["saved_bytes_over_plan"], marks=pytest.mark.long),
    ],
)
def test_the_offload_fails(defect: str, problems: list[str]) -> None:
    (outcome,) = run_mesh(_offload_with, defect)
    assert _words(outcome) == problems, outcome.problems


# ---- Attention, which needs no mesh ----


def _attention(**options: Any) -> Any:
    from minpro_megatron.gpu_checks import attention

    shapes, limits = attention.SMALL
    return attention.check(torch.device("cpu"), shapes, limits, **options)


def test_attention_passes() -> None:
    outcome = _attention()
    assert outcome.problems == []


@pytest.mark.long
def test_attention_fails_without_its_masks() -> None:
    from minpro_megatron.actor.backends.torch_backend import packed_attention

    def unmasked(query: Any, key_value: Any, layout: Any, scale: Any) -> Any:
        mask = layout.mask_N1QK
        return packed_attention(
            query, key_value, replace(layout, mask_N1QK=mask if mask is None else mask | True), scale
        )

    assert _words(_attention(attention=unmasked)) == ["context_error", "context_gradient_error"]


@pytest.mark.long
def test_attention_fails_if_it_holds_the_scores() -> None:
    from minpro_megatron.gpu_checks import attention

    shapes, _ = attention.SMALL
    operands = 4 * 3 * 24 * (4 + 2 * 2) * 16
    for peak, expected in ((3 * operands, []), (9 * operands, ["causal_peak_over_operands"])):
        limits = tuple(limit for limit in attention.FULL[1] if limit.name == "causal_peak_over_operands")
        outcome = attention.check(torch.device("cpu"), shapes, limits, meter=GivenMeter(peak=peak))
        assert _words(outcome) == expected
