"""What a bfloat16 model keeps in float32: the router, the gradients, the optimizer's weights. No run asks for bfloat16
on a CPU (RunConfig refuses it), but everything between the settings and the kernels is the same here."""

from typing import Any

import numpy as np
import pytest
import torch

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.ragged_batch import Groups, in_order
from tests.mesh.steps import step_config
from tests.support.long_cases import long_after

pytestmark = pytest.mark.mesh

MESHES: list[dict[str, int]] = [{"tensor": 2, "expert": 2}, {"pipeline": 2}, {"context": 2}]
SMALL = 1e-6  # the paper's learning rate, at which a bfloat16 weight moves only if it is tiny


def _policy(mesh: Mesh, config: RunConfig, hf_path: str, dtype: torch.dtype) -> Any:
    from minpro_megatron.actor.model import ModelFeatures, build_model
    from minpro_megatron.actor.policy import Policy
    from minpro_megatron.models.architecture import read_architecture
    from minpro_megatron.weights.hf_files import HfReader
    from minpro_megatron.weights.local import load_hf_tensors

    architecture = read_architecture(hf_path)
    chunks = build_model(architecture, mesh, dtype, ModelFeatures(routing_replay=True))
    load_hf_tensors(chunks, architecture, mesh, HfReader(hf_path))
    return Policy(config, architecture, chunks, mesh, records_log_probs=True)


def _steps(mesh: Mesh, config: RunConfig, hf_path: str, sequences: list[TokenSequence]) -> dict[str, Any]:
    """A small update in either precision, with the same routes: a token on the edge of two experts proves nothing."""
    from minpro_megatron.metrics.metric import merge

    exact, rounded = (_policy(mesh, config, hf_path, dtype) for dtype in (torch.float32, torch.bfloat16))
    routers = [module for module in rounded.modules[0].modules() if type(module).__name__ == "TopKRouter"]
    seen = [_watch(router) for router in routers]
    expected_scores, routes = exact.score_and_record(sequences)
    scores = rounded.score(sequences, routes)
    before = [parameter.detach().clone() for parameter in rounded.modules[0].parameters()]
    main_before = [main.clone() for main in _main_weights(rounded)]
    results = [policy.update(sequences, SMALL, routes=routes) for policy in (exact, rounded)]
    losses = [merge(mesh.from_all_ranks(result.metrics))["objective/loss"].value for result in results]
    parameters = list(rounded.modules[0].parameters())
    mains = _main_weights(rounded)
    gradients = [
        torch.cat([parameter.main_grad.double().flatten() for parameter in policy.modules[0].parameters()])
        for policy in (exact, rounded)
    ]
    return {
        "scores": (expected_scores, scores),
        "losses": losses,
        "norms": [result.grad_norm for result in results],
        "cosine": float(torch.nn.functional.cosine_similarity(*gradients, dim=0)),
        "weights": {parameter.dtype for parameter in parameters},
        "gradients": {parameter.main_grad.dtype for parameter in parameters},
        "main": {main.dtype for main in mains},
        "moments": {value.dtype for value in _moments(rounded)},
        "weights_moved": sum(int((now != then).sum()) for now, then in zip(parameters, before, strict=True))
        / sum(parameter.numel() for parameter in parameters),
        "main_moved": [float((now - then).abs().max()) for now, then in zip(mains, main_before, strict=True)],
        "routers": [dict(one) for one in seen],
    }


def _watch(router: Any) -> dict[str, Any]:
    """What the router's latest pass computed, and in what."""
    seen: dict[str, Any] = {}
    gating = router.gating

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        logits = gating(hidden)
        flat = hidden.detach().flatten(0, -2)
        exact = flat.double() @ router.weight.detach().double().t()
        in_bfloat16 = (flat @ router.weight.detach().t()).double()
        found = logits.detach().flatten(0, -2).double()
        seen.update(
            input=hidden.dtype,
            logits=logits.dtype,
            error=float((found - exact).abs().max()),
            error_of_bfloat16=float((in_bfloat16 - exact).abs().max()),
        )
        return logits

    router.gating = watched
    router.register_forward_hook(lambda module, arguments, output: seen.update(probs=output[0].dtype))
    return seen


def _optimizers(policy: Any) -> list[Any]:
    return [one.optimizer for one in getattr(policy._optimizer, "chained_optimizers", [policy._optimizer])]


def _main_weights(policy: Any) -> list[torch.Tensor]:
    return [main for one in _optimizers(policy) for group in one.param_groups for main in group["params"]]


def _moments(policy: Any) -> list[torch.Tensor]:
    states = [state for one in _optimizers(policy) for state in one.state.values()]
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("parallel", long_after(1, MESHES), ids=str)
def test_a_bfloat16_step_is_close_to_float32_and_loses_no_small_update(
    parallel: dict[str, int], starts: dict[str, Start]
) -> None:
    start, config = starts["moe"], step_config(parallel)
    ranks = run_mesh(_steps, config, start.hf_path, in_order(start.groups), **parallel)
    for rank in ranks:
        assert rank["weights"] == {torch.bfloat16}
        assert rank["gradients"] == rank["main"] == rank["moments"] == {torch.float32}
        for router in rank["routers"]:
            assert router["input"] == torch.bfloat16
            assert router["logits"] == router["probs"] == torch.float32
            assert router["error"] < 1e-2 * router["error_of_bfloat16"]
        assert rank["weights_moved"] < 0.02
        assert all(SMALL / 2 < moved < 2 * SMALL for moved in rank["main_moved"]), rank["main_moved"]
        expected, found = rank["scores"]
        assert np.abs(found - expected).mean() < 0.02
        assert rank["losses"][1] == pytest.approx(rank["losses"][0], rel=0.02)
        assert rank["norms"][1] == pytest.approx(rank["norms"][0], rel=0.02)
        assert rank["cosine"] > 0.999
    assert sum(len(rank["routers"]) for rank in ranks) == 4 * len(ranks) // parallel.get("pipeline", 1)


def _start_ratios(mesh: Mesh, config: RunConfig, hf_path: str, groups: Groups) -> dict[str, Any]:
    """Before any update: the behavior log-probs of a batch of two mini-batches, and those that the updates compute."""
    from contextlib import nullcontext

    from minpro_megatron.actor.behavior import mini_batches_of, score_by_version
    from minpro_megatron.batching.sequences import with_log_probs
    from minpro_megatron.metrics.metric import merge, values

    policy, rows = _policy(mesh, config, hf_path, torch.bfloat16), []
    policy.modules[0].register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].tolist()))
    versions = [[np.zeros(len(one.response_ids), np.int32) for one in group] for group in groups]
    behavior = score_by_version(
        policy, mini_batches_of(groups, 2), mini_batches_of(versions, 2), lambda version: nullcontext()
    )
    scored_rows = [rows.pop(0) for _ in range(len(rows))]
    scored = mini_batches_of(with_log_probs(groups, behavior_log_probs=behavior), 2)
    results = [policy.update(mini_batch, learning_rate=0.0) for mini_batch in scored]
    trained_rows = [rows.pop(0) for _ in range(len(rows))]
    metrics = [values(merge(mesh.from_all_ranks(result.metrics))) for result in results]
    return {
        "ratios": [(one["ratio/min"], one["ratio/max"], one["ratio/log_second_moment"]) for one in metrics],
        "trained": np.concatenate([result.log_probs for result in results]),
        "behavior": behavior,
        "rows": (scored_rows, trained_rows),
    }


@pytest.mark.parametrize("parallel", long_after(1, MESHES), ids=str)
def test_before_any_update_every_ratio_is_exactly_one(parallel: dict[str, int], starts: dict[str, Start]) -> None:
    start = starts["moe"]
    config = step_config(parallel)
    for rank in run_mesh(_start_ratios, config, start.hf_path, start.groups, **parallel):
        assert rank["ratios"] == [(1.0, 1.0, 0.0)] * 2
        np.testing.assert_array_equal(rank["trained"], rank["behavior"])
        # kernels of a GPU round a row's tokens by what stands beside them, those of this CPU do not: what is the same
        # everywhere is that the update has the very rows that were scored
        scored_rows, trained_rows = rank["rows"]
        assert len(scored_rows) >= 2
        assert scored_rows == trained_rows
