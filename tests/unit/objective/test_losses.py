"""The loss functions for one's own training loop equal the loops written from the papers, packed and padded."""

import inspect
import math
from typing import Any, get_args

import numpy as np
import pytest
import torch

from minpro_megatron import objective
from minpro_megatron.config.objective import Aggregation
from minpro_megatron.objective.registry import OBJECTIVES
from tests.support.loss_inputs import FUNCTIONS, packed, padded
from tests.support.objective_loops import LOOPS, expected_loss
from tests.support.ragged_tokens import DEFAULTS, random_tokens

# bounds between which some tokens of a small drift lie and some do not
ARGUMENTS: dict[str, dict[str, Any]] = {
    "gspo": {"clip_low": 0.1, "clip_high": 0.15},
    "m2po": {"second_moment": 0.02},
    "m2po_winsorized": {"second_moment": 0.02, "clip_low": 0.05, "clip_high": 0.1},
    "ctpo": {"log_clip_low": 0.1, "log_clip_high": 0.1, "log_dual_clip": 0.2, "log_clamp": 1.5},
    "prefix_filter": {"quantile": 0.3},
    "shuffled_minpro": {"seed": 3},
}


def small_batch() -> tuple[torch.Tensor, ...]:
    """[2, 3] tensors: log-probs, old log-probs, advantages, mask; two sequences with 3 and 1 trained tokens."""
    old = torch.tensor([[-1.0, -2.0, -0.5], [-0.7, -1.2, -0.1]])
    advantages = torch.tensor([[1.0] * 3, [-1.0] * 3])
    return old + 0.1, old, advantages, torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_every_objective_has_a_function_with_its_settings_and_defaults() -> None:
    assert {f"{name}_loss" for name in OBJECTIVES} == {name for name in objective.__all__ if name.endswith("_loss")}
    shared = list(inspect.signature(FUNCTIONS["cispo"]).parameters)[-5:]
    for name, function in FUNCTIONS.items():
        parameters = dict(inspect.signature(function).parameters)
        settings = {field: default for field, default in DEFAULTS[name] if field != "name"}
        keywords = {
            each.name: each.default
            for each in parameters.values()
            if each.kind is inspect.Parameter.KEYWORD_ONLY and each.name not in shared
        }
        keywords.pop("seed", None)
        assert keywords == settings, name
        assert all(f"{each}:" in (inspect.getdoc(function) or "") for each in shared)


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_packed_and_padded_losses_equal_the_papers_loop(aggregation: Aggregation, name: str) -> None:
    tokens = random_tokens(2, drift=0.1)
    arguments = ARGUMENTS.get(name, {})
    settings = DEFAULTS[name].model_copy(update=arguments)
    loss, gradient = expected_loss(LOOPS[name](tokens, settings), tokens, aggregation)
    assert np.count_nonzero(gradient) > 20
    flat, boundaries = packed(tokens)
    for found, slope in (
        flat.loss(name, aggregation=aggregation, cu_seqlens=boundaries, **arguments),
        flat.loss(name, aggregation=aggregation, cu_seqlens=torch.tensor(boundaries, dtype=torch.int32), **arguments),
        padded(tokens, multiple=8).loss(name, aggregation=aggregation, **arguments),
    ):
        assert found == pytest.approx(loss, rel=1e-11)
        np.testing.assert_allclose(slope, gradient, rtol=1e-11, atol=1e-14)
    single, slope = padded(tokens, dtype=torch.float32).loss(name, aggregation=aggregation, **arguments)
    assert single == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(slope, gradient, rtol=1e-6, atol=1e-8)


def test_the_shuffle_of_a_padded_batch_is_that_of_the_packed_one() -> None:
    tokens = random_tokens(5)
    flat, boundaries = packed(tokens)
    (first, slope), (second, other) = (
        flat.loss("shuffled_minpro", seed=3, cu_seqlens=boundaries),
        padded(tokens).loss("shuffled_minpro", seed=3),
    )
    assert first == pytest.approx(second, rel=1e-12)
    np.testing.assert_allclose(slope, other, rtol=1e-12)
    assert flat.loss("shuffled_minpro", seed=4, cu_seqlens=boundaries)[0] != first


def test_a_given_denominator_joins_micro_batches_to_one_mean() -> None:
    tokens = random_tokens(4)
    whole, gradient = padded(tokens).loss("minpro")
    halves = [tokens.where(tokens.sequence < 5), tokens.where(tokens.sequence >= 5)]
    count = int(tokens.trained.sum())
    losses, slopes = zip(
        padded(halves[0]).loss("minpro", denominator=count),
        padded(halves[1]).loss("minpro", denominator=torch.tensor(float(count))),
        strict=True,
    )
    assert sum(losses) == pytest.approx(whole, rel=1e-12)
    np.testing.assert_allclose(np.concatenate(slopes), gradient, rtol=1e-12)


def test_one_advantage_per_sequence_is_that_of_its_tokens() -> None:
    log_probs, old, advantages, mask = small_batch()
    expected = objective.minpro_loss(log_probs, old, advantages, mask)
    assert torch.equal(objective.minpro_loss(log_probs, old, advantages[:, 0], mask), expected)
    flat = [one.reshape(-1) for one in (log_probs, old, advantages, mask)]
    flat[2] = advantages[:, 0]
    assert torch.equal(objective.minpro_loss(*flat, cu_seqlens=[0, 3, 6]), expected)


def test_metrics_are_those_of_the_trained_tokens() -> None:
    metrics: dict[str, float] = {}
    loss = objective.minpro_loss(*small_batch(), metrics=metrics)
    assert metrics["objective/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["ratio/mean"] == pytest.approx(math.exp(0.1), rel=1e-6)
    assert metrics["prefix_min/mean"] == pytest.approx((2 + 2 * math.exp(0.1)) / 4, rel=1e-6)
    assert not any("entropy" in name or "mismatch" in name or "staleness" in name for name in metrics)


def test_half_precision_is_summed_in_float32_and_its_gradient_has_its_type() -> None:
    log_probs, old, advantages, mask = small_batch()
    half = log_probs.bfloat16().requires_grad_()
    loss = objective.minpro_loss(half, old, advantages, mask)
    loss.backward()
    assert half.grad is not None
    assert (loss.dtype, half.grad.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(loss, objective.minpro_loss(half.detach().float(), old, advantages, mask))


def test_without_a_trained_token_the_loss_and_its_gradient_are_zero() -> None:
    log_probs, old, advantages, mask = small_batch()
    log_probs.requires_grad_()
    loss = objective.minpro_loss(log_probs, old, advantages, torch.zeros_like(mask))
    loss.backward()
    assert loss == 0
    assert log_probs.grad is not None
    assert not log_probs.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_log_probs": torch.zeros(2, 4)}, r"old_log_probs has shape \(2, 4\), log_probs has \(2, 3\)"),
        ({"mask": torch.ones(6)}, r"mask has shape \(6,\)"),
        ({"advantages": torch.ones(3)}, r"advantages has shape \(3,\)"),
        ({"log_probs": torch.zeros(6)}, "give cu_seqlens"),
        ({"log_probs": torch.zeros(1, 2, 3)}, "must be"),
        ({"cu_seqlens": [0, 6]}, "cu_seqlens belongs to packed tensors"),
        ({"denominator": 0}, "denominator = 0: it must be above 0"),
        ({"context_layout": "zig-zag"}, "zigzag, contiguous"),
        ({"clip_low": 2.0}, "clip_low"),
        ({"aggregation": "mean"}, "token_mean"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    names = ("log_probs", "old_log_probs", "advantages", "mask")
    with pytest.raises(ValueError, match=message):
        FUNCTIONS["minpro"](**(dict(zip(names, small_batch(), strict=True)) | change))


@pytest.mark.parametrize("boundaries", [[1, 6], [0, 5], [0, 4, 3, 6], [], [[0, 6]]])
def test_wrong_boundaries_are_refused(boundaries: list) -> None:
    flat = [one.reshape(-1) for one in small_batch()]
    with pytest.raises(ValueError, match="cu_seqlens must start with 0"):
        objective.minpro_loss(*flat, cu_seqlens=torch.tensor(boundaries))
