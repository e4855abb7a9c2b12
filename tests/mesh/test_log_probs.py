"""Log-probs from vocabulary shards equal the whole softmax in float64: values, entropies and gradients."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minpro_megatron.parallel import log_probs as module
from minpro_megatron.parallel.log_probs import vocab_parallel_log_probs
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.log_prob_cases import CASES, ONE_RANK, ROUNDED, TOKENS, VOCABULARY, Case, inputs
from tests.support.long_cases import long_after

pytestmark = pytest.mark.mesh

NAMES = ("log_probs", "entropies", "hidden", "weight")


def _log_probs_on_rank(mesh: Mesh, cases: list[Case]) -> list[dict[str, np.ndarray]]:
    size, rank = mesh.tensor.size(), mesh.tensor.rank()
    found = []
    for case in cases:
        hidden, weight, labels, upstream = inputs(case)
        hidden = hidden.chunk(size)[rank].clone().requires_grad_()
        weight = weight.chunk(size)[rank].clone().requires_grad_()
        module.CPU_BLOCK = (module.CPU_BLOCK[0], case.block_columns)
        log_probs, entropies = vocab_parallel_log_probs(
            hidden,
            weight,
            labels,
            vocab_size=VOCABULARY,
            temperature=case.temperature,
            group=mesh.tensor,
            chunk_tokens=case.chunk_tokens,
        )
        assert log_probs.dtype == entropies.dtype == torch.float32
        assert not entropies.requires_grad
        (log_probs * upstream.chunk(size)[rank]).sum().backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        results = (log_probs.detach(), entropies, hidden.grad.float(), weight.grad.float())
        found.append({name: t.numpy() for name, t in zip(NAMES, results, strict=True)})
    return found


def whole_softmax(case: Case) -> dict[str, np.ndarray]:
    hidden, weight, labels, upstream = inputs(case)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_softmax = (hidden @ weight[:VOCABULARY].t() / case.temperature).log_softmax(-1)
    log_probs = log_softmax.gather(1, labels[:, None])[:, 0]
    entropies = -(log_softmax.exp() * log_softmax).sum(-1)
    gradients: Any = torch.autograd.grad((log_probs * upstream.double()).sum(), (hidden, weight))
    results = (log_probs, entropies, *gradients)
    return {name: t.detach().numpy() for name, t in zip(NAMES, results, strict=True)}


@pytest.mark.parametrize("tensor", long_after(2, [1, 4, 2]))
def test_vocabulary_shards_give_the_whole_softmax(tensor: int) -> None:
    ranks = run_mesh(_log_probs_on_rank, CASES, tensor=tensor)
    for index, case in enumerate(CASES):
        expected = whole_softmax(case)
        for name, values in expected.items():
            found = np.concatenate([rank[index][name] for rank in ranks])
            scale = max(1.0, float(np.abs(values).max()))
            # only the returned gradients are rounded to bfloat16: logits and sums are not
            relative = ROUNDED if case.dtype == "bfloat16" and name in ("hidden", "weight") else 0
            np.testing.assert_allclose(
                found, values, rtol=relative, atol=case.tolerance * scale, err_msg=f"{case.name}: {name}"
            )
        weight_gradient = np.concatenate([rank[index]["weight"] for rank in ranks])
        assert not weight_gradient[VOCABULARY:].any(), f"{case.name}: padding columns have a gradient"
    entropies = np.concatenate([rank[4]["entropies"] for rank in ranks])
    assert entropies.min() < 1e-3  # probabilities did underflow


@dataclass(frozen=True)
class Fault:
    name: str
    hidden: float | None = None  # put into token 9
    weight: float | None = None  # put into column 40
    label: int | None = None  # of token 9
    tokens: tuple[int, ...] = (9,)  # that must be NaN


EVERY_TOKEN = tuple(range(TOKENS))
FAULTS = [
    Fault("no fault", tokens=()),
    Fault("NaN token", hidden=np.nan),
    Fault("infinite token", hidden=np.inf),
    Fault("negative infinite token", hidden=-np.inf),
    Fault("NaN column", weight=np.nan, tokens=EVERY_TOKEN),
    Fault("infinite column", weight=np.inf, tokens=EVERY_TOKEN),
    Fault("negative infinite column", weight=-np.inf, tokens=EVERY_TOKEN),
    Fault("label in the padding", label=VOCABULARY),
    Fault("negative label", label=-100),
]


def _faults_on_rank(mesh: Mesh) -> list[dict[str, np.ndarray]]:
    size, rank = mesh.tensor.size(), mesh.tensor.rank()
    module.CPU_BLOCK = (4 * size, 16)
    found = []
    for fault in FAULTS:
        hidden, weight, labels, upstream = inputs(Case("finite"))
        hidden[9, 2] = hidden[9, 2] if fault.hidden is None else fault.hidden
        weight[40, 3] = weight[40, 3] if fault.weight is None else fault.weight
        labels[9] = labels[9] if fault.label is None else fault.label
        hidden = hidden.float().chunk(size)[rank].clone().requires_grad_()
        weight = weight.float().chunk(size)[rank].clone().requires_grad_()
        log_probs, entropies = vocab_parallel_log_probs(
            hidden, weight, labels, vocab_size=VOCABULARY, temperature=1.0, group=mesh.tensor
        )
        (log_probs * upstream.chunk(size)[rank]).sum().backward()
        assert hidden.grad is not None
        results = (log_probs.detach(), entropies, hidden.grad.sum(1))
        found.append({name: t.numpy() for name, t in zip(("log_probs", "entropies", "hidden"), results, strict=True)})
    return found


@pytest.mark.parametrize("tensor", long_after(1, [4, 1]))
def test_what_is_not_finite_gives_nan_and_only_there(tensor: int) -> None:
    ranks = run_mesh(_faults_on_rank, tensor=tensor)
    for index, fault in enumerate(FAULTS):
        expected = np.isin(np.arange(TOKENS), fault.tokens)
        for name in ("log_probs", "entropies", "hidden"):
            values = np.concatenate([rank[index][name] for rank in ranks])
            np.testing.assert_array_equal(np.isnan(values), expected, err_msg=f"{fault.name}: {name}")
            assert np.isfinite(values[~expected]).all(), f"{fault.name}: {name}"


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_no_tensor_is_larger_than_a_block_or_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, vocabulary, hidden_size, block = 60, 500, 8, (20, 100)
    monkeypatch.setattr(module, "CPU_BLOCK", block)
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    with _LargestTensor() as largest:
        log_probs, _ = vocab_parallel_log_probs(
            hidden, weight, labels, vocab_size=vocabulary, temperature=1.0, group=ONE_RANK
        )
        forward = largest.numbers
        log_probs.sum().backward()
    assert forward == block[0] * block[1]
    assert largest.numbers == vocabulary * hidden_size  # the weight's gradient; tokens x vocabulary would be 30,000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_gpu_compiles_is_traced_whole_and_for_all_shapes(dtype: torch.dtype) -> None:
    add_block = torch.compile(module._add_block, dynamic=True, fullgraph=True, backend="aot_eager")
    logit_gradient = torch.compile(module._logit_gradient, dynamic=True, fullgraph=True, backend="aot_eager")
    for tokens, columns in ((6, 9), (3, 14)):
        logits = torch.randn(tokens, columns)
        sums = torch.full((tokens,), -torch.inf), torch.zeros(tokens), torch.zeros(tokens)
        found, expected = sums, sums
        for block in (logits, 3 * logits):
            found, expected = add_block(block, *found), module._add_block(block, *expected)
            torch.testing.assert_close(found, expected)
        arguments = (logits, logits.logsumexp(1), torch.arange(tokens) - 1, torch.randn(tokens), dtype)
        torch.testing.assert_close(logit_gradient(*arguments), module._logit_gradient(*arguments))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_the_whole_softmax(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("one GPU", dtype=dtype, temperature=0.7)
    monkeypatch.setattr(module, "CUDA_BLOCK", (10, 24))
    hidden, weight, labels, upstream = (tensor.cuda() for tensor in inputs(case))
    hidden.requires_grad_()
    weight.requires_grad_()
    log_probs, entropies = vocab_parallel_log_probs(
        hidden, weight, labels, vocab_size=VOCABULARY, temperature=case.temperature, group=ONE_RANK
    )
    gradients = torch.autograd.grad((log_probs * upstream).sum(), (hidden, weight))
    expected = whole_softmax(case)
    for name, found in zip(NAMES, (log_probs, entropies, *gradients), strict=True):
        # logit gradients are rounded to bfloat16 before they are multiplied, and sums of them vary in sign
        tolerance = 8 * ROUNDED if dtype == "bfloat16" and name in ("hidden", "weight") else 1e-4
        scale = max(1.0, float(np.abs(expected[name]).max()))
        np.testing.assert_allclose(
            found.detach().float().cpu().numpy(), expected[name], rtol=0, atol=tolerance * scale, err_msg=name
        )
