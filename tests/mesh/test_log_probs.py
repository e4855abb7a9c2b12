"""Log-probs from vocabulary shards equal the whole softmax in float64: values, entropies and gradients."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minpro_megatron.parallel.log_probs import vocab_parallel_log_probs
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh

pytestmark = pytest.mark.mesh

TOKENS, HIDDEN, VOCABULARY, PADDED = 24, 16, 77, 128  # with 4 ranks one has 13 real columns and one has none


@dataclass(frozen=True)
class Case:
    name: str
    chunk_tokens: int | None = None
    temperature: float = 1.0
    scale: float = 1.0  # of the hidden states: large logits underflow in the softmax
    dtype: str = "float32"
    tolerance: float = 2e-5


CASES = [
    Case("plain"),
    Case("one token a chunk", chunk_tokens=1),
    Case("uneven chunks and temperature", chunk_tokens=5, temperature=0.7),
    Case("chunk longer than the row, hot", chunk_tokens=1000, temperature=1.6),
    Case("probabilities that underflow", scale=60.0, chunk_tokens=4, tolerance=2e-3),
    Case("bfloat16", dtype="bfloat16", temperature=0.9, tolerance=4e-2),
]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight with huge padding rows, labels, upstream gradient) of the whole row, in the case's dtype."""
    random = np.random.default_rng(0)
    dtype = getattr(torch, case.dtype)
    hidden = torch.from_numpy(random.normal(0, case.scale, (TOKENS, HIDDEN))).to(dtype)
    weight = torch.from_numpy(random.normal(0, 0.6, (PADDED, HIDDEN)))
    weight[VOCABULARY:] = 9.0
    labels = torch.from_numpy(random.integers(0, VOCABULARY, TOKENS))
    labels[:2] = torch.tensor([0, VOCABULARY - 1])
    upstream = torch.from_numpy(random.normal(0, 1, TOKENS)).float()
    upstream[3] = 0  # a masked token
    return hidden, weight.to(dtype), labels, upstream


def _log_probs_on_rank(mesh: Mesh, cases: list[Case]) -> list[dict[str, np.ndarray]]:
    size, rank = mesh.tensor.size(), mesh.tensor.rank()
    found = []
    for case in cases:
        hidden, weight, labels, upstream = inputs(case)
        hidden = hidden.chunk(size)[rank].clone().requires_grad_()
        weight = weight.chunk(size)[rank].clone().requires_grad_()
        log_probs, entropies = vocab_parallel_log_probs(
            hidden,
            weight,
            labels,
            vocab_size=VOCABULARY,
            temperature=case.temperature,
            group=mesh.tensor,
            chunk_tokens=case.chunk_tokens,
        )
        assert not entropies.requires_grad
        (log_probs * upstream.chunk(size)[rank]).sum().backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        results = (log_probs.detach(), entropies, hidden.grad.float(), weight.grad.float())
        found.append(
            {name: t.numpy() for name, t in zip(("log_probs", "entropies", "hidden", "weight"), results, strict=True)}
        )
    return found


def whole_softmax(case: Case) -> dict[str, np.ndarray]:
    hidden, weight, labels, upstream = inputs(case)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_softmax = (hidden @ weight[:VOCABULARY].t() / case.temperature).log_softmax(-1)
    log_probs = log_softmax.gather(1, labels[:, None])[:, 0]
    entropies = -(log_softmax.exp() * log_softmax).sum(-1)
    gradients: Any = torch.autograd.grad((log_probs * upstream.double()).sum(), (hidden, weight))
    results = (log_probs, entropies, *gradients)
    return {
        name: t.detach().numpy()
        for name, t in zip(("log_probs", "entropies", "hidden", "weight"), results, strict=True)
    }


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_vocabulary_shards_give_the_whole_softmax(tensor: int) -> None:
    ranks = run_mesh(_log_probs_on_rank, CASES, tensor=tensor)
    for index, case in enumerate(CASES):
        expected = whole_softmax(case)
        for name, values in expected.items():
            found = np.concatenate([rank[index][name] for rank in ranks])
            scale = max(1.0, float(np.abs(values).max()))
            np.testing.assert_allclose(
                found, values, rtol=0, atol=case.tolerance * scale, err_msg=f"{case.name}: {name}"
            )
        weight_gradient = np.concatenate([rank[index]["weight"] for rank in ranks])
        assert not weight_gradient[VOCABULARY:].any(), f"{case.name}: padding columns have a gradient"
    entropies = np.concatenate([rank[4]["entropies"] for rank in ranks])
    assert entropies.min() < 1e-3  # probabilities did underflow
