"""Log-probs of a softmax restricted to kept columns equal a whole softmax over these columns in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minpro_megatron.parallel import log_probs as module
from minpro_megatron.parallel.kept_columns import KeptColumns
from minpro_megatron.parallel.log_probs import kept_log_probs, vocab_parallel_log_probs
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.mesh.log_prob_cases import CASES, ONE_RANK, ROUNDED, TOKENS, VOCABULARY, Case, inputs
from tests.support.long_cases import long_after

pytestmark = pytest.mark.mesh

NAMES = ("log_probs", "entropies", "kept_masses", "hidden", "weight")
# tokens without a support, as those of prompts; the others keep between one id and the whole vocabulary
FREE = (0, 5, 17)
WHOLE, SINGLE, FIRST_RANKS_ONLY = 6, 7, 8


def kept_ids(labels: Tensor) -> list[np.ndarray]:
    """The ids that each token keeps, its label among them; none for the tokens FREE."""
    random = np.random.default_rng(4)
    found = []
    for token, label in enumerate(labels.tolist()):
        others = random.permutation(VOCABULARY)[: random.integers(1, 30)]
        own = {WHOLE: np.arange(VOCABULARY), SINGLE: np.array([], int), FIRST_RANKS_ONLY: np.arange(3)}
        ids = np.union1d(own.get(token, others), [label])
        found.append(random.permutation(ids) if token not in FREE else ids[:0])
    return found


def columns_of(kept: list[np.ndarray], first: int, count: int) -> KeptColumns:
    sizes = np.array([len(ids) for ids in kept], np.int32)
    return KeptColumns.of(sizes, np.concatenate(kept).astype(np.int32), first, count, torch.device("cpu"))


def _kept_on_rank(mesh: Mesh, cases: list[Case]) -> list[dict[str, np.ndarray]]:
    size, rank = mesh.tensor.size(), mesh.tensor.rank()
    found = []
    for case in cases:
        hidden, weight, labels, upstream = inputs(case)
        hidden = hidden.chunk(size)[rank].clone().requires_grad_()
        weight = weight.chunk(size)[rank].clone().requires_grad_()
        module.CPU_BLOCK = (module.CPU_BLOCK[0], case.block_columns)
        log_probs, entropies, masses = kept_log_probs(
            hidden,
            weight,
            labels,
            columns_of(kept_ids(labels), rank * len(weight), len(weight)),
            vocab_size=VOCABULARY,
            temperature=case.temperature,
            group=mesh.tensor,
            chunk_tokens=case.chunk_tokens,
        )
        assert not entropies.requires_grad
        assert not masses.requires_grad
        (log_probs * upstream.chunk(size)[rank]).sum().backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        results = (log_probs.detach(), entropies, masses, hidden.grad.float(), weight.grad.float())
        found.append({name: t.numpy() for name, t in zip(NAMES, results, strict=True)})
    return found


def restricted_softmax(case: Case) -> dict[str, np.ndarray]:
    """In float64, one token at a time, from the logits of its kept ids alone."""
    hidden, weight, labels, upstream = inputs(case)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight[:VOCABULARY].t() / case.temperature
    log_probs, masses = [], []
    for token, ids in enumerate(kept_ids(labels)):
        chosen = torch.from_numpy(ids) if len(ids) else torch.arange(VOCABULARY)
        log_probs.append(logits[token, labels[token]] - logits[token, chosen].logsumexp(0))
        masses.append(logits[token].softmax(0)[chosen].sum())
    whole = logits.log_softmax(-1)
    entropies = -(whole.exp() * whole).sum(-1)
    gradients: Any = torch.autograd.grad((torch.stack(log_probs) * upstream.double()).sum(), (hidden, weight))
    results = (torch.stack(log_probs), entropies, torch.stack(masses), *gradients)
    return {name: t.detach().numpy() for name, t in zip(NAMES, results, strict=True)}


@pytest.mark.parametrize("tensor", long_after(1, [4, 1, 2]))
def test_vocabulary_shards_give_the_softmax_over_the_kept_columns(tensor: int) -> None:
    ranks = run_mesh(_kept_on_rank, CASES, tensor=tensor)
    for index, case in enumerate(CASES):
        expected = restricted_softmax(case)
        for name, values in expected.items():
            found = np.concatenate([rank[index][name] for rank in ranks])
            scale = max(1.0, float(np.abs(values).max()))
            relative = ROUNDED if case.dtype == "bfloat16" and name in ("hidden", "weight") else 0
            np.testing.assert_allclose(
                found, values, rtol=relative, atol=case.tolerance * scale, err_msg=f"{case.name}: {name}"
            )
        assert abs(expected["log_probs"][SINGLE]) < 1e-12
        assert expected["kept_masses"].min() < 0.1  # the columns left out matter
        weight_gradient = np.concatenate([rank[index]["weight"] for rank in ranks])
        assert not weight_gradient[VOCABULARY:].any(), f"{case.name}: padding columns have a gradient"


def _faults_on_rank(mesh: Mesh) -> dict[str, np.ndarray]:
    """A label that its token does not keep, and a logit that is not finite in a column that no token keeps."""
    size, rank = mesh.tensor.size(), mesh.tensor.rank()
    found = {}
    for name in ("label", "column"):
        hidden, weight, labels, upstream = (one.float() for one in inputs(Case("finite")))
        kept = [np.setdiff1d(ids, [40]) for ids in kept_ids(labels.long())]
        labels = torch.tensor([ids[0] if len(ids) else 0 for ids in kept])
        if name == "label":
            kept[9] = np.setdiff1d(np.arange(VOCABULARY), labels[9:10])
        else:
            weight[40, 3] = torch.inf
        hidden = hidden.chunk(size)[rank].clone().requires_grad_()
        own = columns_of(kept, rank * len(weight) // size, len(weight) // size)
        log_probs, _, masses = kept_log_probs(
            hidden, weight.chunk(size)[rank], labels, own, vocab_size=VOCABULARY, temperature=1.0, group=mesh.tensor
        )
        (log_probs * upstream.chunk(size)[rank]).sum().backward()
        assert hidden.grad is not None
        found[name] = torch.stack([log_probs.detach(), masses, hidden.grad.sum(1)]).isnan().numpy()
    return found


@pytest.mark.parametrize("tensor", long_after(1, [4, 1]))
def test_a_label_that_is_not_kept_gives_nan_and_so_does_a_logit_that_is_not_finite(tensor: int) -> None:
    ranks = run_mesh(_faults_on_rank, tensor=tensor)
    only = np.arange(TOKENS) == 9
    np.testing.assert_array_equal(np.concatenate([rank["label"] for rank in ranks], axis=1), [only] * 3)
    assert np.concatenate([rank["column"] for rank in ranks], axis=1).all()


def _free_on_rank(mesh: Mesh) -> None:
    """Without a support at any token every bit is that of the whole softmax."""
    size, rank = mesh.tensor.size(), mesh.tensor.rank()
    results = []
    for restricted in (False, True):
        hidden, weight, labels, upstream = inputs(Case("free"))
        hidden = hidden.float().chunk(size)[rank].clone().requires_grad_()
        weight = weight.float().chunk(size)[rank].clone().requires_grad_()
        common: dict[str, Any] = {"vocab_size": VOCABULARY, "temperature": 0.8, "group": mesh.tensor, "chunk_tokens": 5}
        if restricted:
            none = columns_of([np.array([], int)] * TOKENS, rank * len(weight), len(weight))
            log_probs, _, masses = kept_log_probs(hidden, weight, labels, none, **common)
            assert (masses == 1).all()
        else:
            log_probs, _ = vocab_parallel_log_probs(hidden, weight, labels, **common)
        (log_probs * upstream.chunk(size)[rank]).sum().backward()
        results.append((log_probs.detach(), hidden.grad, weight.grad))
    for plain, kept in zip(*results, strict=True):
        assert torch.equal(plain, kept)


def test_tokens_without_kept_ids_have_the_bits_of_the_whole_softmax() -> None:
    run_mesh(_free_on_rank, tensor=2)


def test_what_a_gpu_compiles_for_kept_columns_is_traced_whole_and_for_all_shapes() -> None:
    add_block = torch.compile(module._add_kept_block, dynamic=True, fullgraph=True, backend="aot_eager")
    gradient = torch.compile(module._kept_logit_gradient, dynamic=True, fullgraph=True, backend="aot_eager")
    for tokens, columns in ((6, 9), (3, 14)):
        logits, is_kept = torch.randn(tokens, columns), torch.rand(tokens, columns) < 0.5
        sums = torch.full((tokens,), -torch.inf), torch.zeros(tokens)
        torch.testing.assert_close(add_block(logits, is_kept, *sums), module._add_kept_block(logits, is_kept, *sums))
        arguments = (logits, is_kept, logits.logsumexp(1), torch.arange(tokens) - 1, torch.randn(tokens), logits.dtype)
        torch.testing.assert_close(gradient(*arguments), module._kept_logit_gradient(*arguments))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_gpu_gives_the_softmax_over_the_kept_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("one GPU", temperature=0.7)
    monkeypatch.setattr(module, "CUDA_BLOCK", (10, 24))
    hidden, weight, labels, upstream = (tensor.cuda() for tensor in inputs(case))
    hidden.requires_grad_()
    weight.requires_grad_()
    ids = kept_ids(labels.cpu())
    sizes = np.array([len(one) for one in ids], np.int32)
    kept = KeptColumns.of(sizes, np.concatenate(ids).astype(np.int32), 0, len(weight), hidden.device)
    log_probs, entropies, masses = kept_log_probs(
        hidden, weight, labels, kept, vocab_size=VOCABULARY, temperature=case.temperature, group=ONE_RANK
    )
    gradients = torch.autograd.grad((log_probs * upstream).sum(), (hidden, weight))
    expected = restricted_softmax(case)
    for name, found in zip(NAMES, (log_probs, entropies, masses, *gradients), strict=True):
        scale = max(1.0, float(np.abs(expected[name]).max()))
        np.testing.assert_allclose(
            found.detach().float().cpu().numpy(), expected[name], rtol=0, atol=1e-4 * scale, err_msg=name
        )
