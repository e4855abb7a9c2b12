"""Log-probs hold one block of logits at a time."""

import weakref
from typing import Any

import pytest
import torch

from minpro_megatron.gpu_checks.log_prob_ways import make_problem, ours
from minpro_megatron.parallel import log_probs


def test_a_block_of_logits_is_gone_before_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a block of 8,192 tokens and columns is 268 MB."""
    made: list[Any] = []
    product, held = log_probs.product, []

    def watched(*arguments: Any) -> torch.Tensor:
        held.append(sum(block() is not None for block in made))
        block = product(*arguments)
        made.append(weakref.ref(block))
        return block

    monkeypatch.setattr(log_probs, "product", watched)
    problem = make_problem(8, 3 * 2048, 4, torch.float32, "cpu")
    values, _ = ours(problem)
    assert held == [0, 0, 0]
    values.backward(problem.upstream_T)
    assert held == [0] * 6
