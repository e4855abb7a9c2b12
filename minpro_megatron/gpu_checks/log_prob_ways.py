"""Ways to compute log-probs and entropies from hidden states: this project's, the naive one, one in chunks of tokens as
in verl, and verl's own where it is installed. All have the same arguments; checks and benchmarks compare them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from minpro_megatron.parallel.log_probs import vocab_parallel_log_probs

TEMPERATURE = 0.9
CHUNK_TOKENS = 512  # as in verl


@dataclass(frozen=True)
class Problem:
    """Hidden states [T, H], the output layer's weight [V, H], labels [T] and the gradient of the log-probs [T]."""

    hidden_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor
    upstream_T: Tensor

    @property
    def flops_of_a_product(self) -> float:
        return 2.0 * self.hidden_TH.numel() * self.weight_VH.shape[0]


Way = Callable[[Problem], tuple[Tensor, Tensor]]  # (log-probs, entropies), float32 [T]


def make_problem(tokens: int, vocabulary: int, hidden: int, dtype: torch.dtype, device: str | torch.device) -> Problem:
    """Filled in place, so that creating it needs no more memory than keeping it."""
    random = torch.Generator(device).manual_seed(0)
    hidden_TH = torch.empty(tokens, hidden, dtype=dtype, device=device).normal_(0, 1, generator=random)
    weight_VH = torch.empty(vocabulary, hidden, dtype=dtype, device=device).normal_(0, 0.05, generator=random)
    labels = torch.randint(0, vocabulary, (tokens,), generator=random, device=device)
    upstream = torch.empty(tokens, device=device).normal_(0, 1, generator=random)
    return Problem(hidden_TH.requires_grad_(), weight_VH.requires_grad_(), labels, upstream)


class _OneRank:
    """A process group of one rank, which sends nothing."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def ours(problem: Problem) -> tuple[Tensor, Tensor]:
    return vocab_parallel_log_probs(
        problem.hidden_TH,
        problem.weight_VH,
        problem.labels_T,
        vocab_size=problem.weight_VH.shape[0],
        temperature=TEMPERATURE,
        group=cast(dist.ProcessGroup, _OneRank()),
    )


def naive(problem: Problem) -> tuple[Tensor, Tensor]:
    """The whole logits, and autograd for the rest."""
    return of_whole_logits(problem.hidden_TH @ problem.weight_VH.t(), problem.labels_T)


def of_whole_logits(logits_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) of the labels from the logits before the temperature."""
    log_softmax = (logits_TV.float() / TEMPERATURE).log_softmax(-1)
    log_probs = log_softmax.gather(1, labels_T[:, None])[:, 0]
    with torch.no_grad():
        entropies = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_probs, entropies


def in_chunks(problem: Problem) -> tuple[Tensor, Tensor]:
    """verl's idea without its code: whole rows of logits, but only of CHUNK_TOKENS tokens at a time, made again in
    backward."""
    return cast(
        tuple[Tensor, Tensor], _InChunks.apply(problem.hidden_TH, problem.weight_VH, problem.labels_T, TEMPERATURE)
    )


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        parts = zip(hidden_TH.split(CHUNK_TOKENS), labels_T.split(CHUNK_TOKENS), strict=True)
        found = [of_whole_logits(hidden @ weight_VH.t(), labels) for hidden, labels in parts]
        ctx.save_for_backward(hidden_TH, weight_VH, labels_T)
        ctx.temperature = temperature
        log_probs, entropies = (torch.cat(column) for column in zip(*found, strict=True))
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, labels_T = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden_TH), torch.zeros_like(weight_VH)
        for start in range(0, len(hidden_TH), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = (hidden_TH[part] @ weight_VH.t()).float() / ctx.temperature
            d_logits = -logits.softmax(-1)
            d_logits[torch.arange(len(d_logits), device=d_logits.device), labels_T[part]] += 1
            d_logits = (d_logits * (gradients[0][part, None] / ctx.temperature)).to(hidden_TH.dtype)
            d_hidden[part] = d_logits @ weight_VH
            d_weight += d_logits.t() @ hidden_TH[part]
        return d_hidden, d_weight, None, None


def verl_torch(problem: Problem) -> tuple[Tensor, Tensor]:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    return FusedLinearForPPO()(problem.hidden_TH, problem.weight_VH, problem.labels_T, TEMPERATURE)


def verl_triton(problem: Problem) -> tuple[Tensor, Tensor]:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    arguments = (problem.hidden_TH, problem.weight_VH, problem.labels_T, TEMPERATURE, "none", None)
    return cast(tuple[Tensor, Tensor], linear_cross_entropy(*arguments))


def forward_and_backward(problem: Problem, way: Way) -> tuple[Tensor, ...]:
    """(log-probs, entropies, d hidden, d weight)."""
    log_probs, entropies = way(problem)
    d_hidden, d_weight = torch.autograd.grad(
        (log_probs * problem.upstream_T).sum(), (problem.hidden_TH, problem.weight_VH)
    )
    return log_probs.detach(), entropies.detach(), d_hidden, d_weight


def in_float64(problem: Problem, chunk: int = 512) -> tuple[Tensor, ...]:
    """The same four from float64 logits, chunk by chunk of tokens, written from the formulas: the oracle."""
    hidden, weight = problem.hidden_TH.detach().double(), problem.weight_VH.detach().double()
    log_probs, entropies = (hidden.new_empty(len(hidden)) for _ in range(2))
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        labels = problem.labels_T[part, None]
        log_softmax = (hidden[part] @ weight.t() / TEMPERATURE).log_softmax(-1)
        probabilities = log_softmax.exp()
        log_probs[part] = log_softmax.gather(1, labels)[:, 0]
        entropies[part] = -(probabilities * log_softmax).sum(-1)
        d_logits = probabilities.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.float64))
        d_logits *= problem.upstream_T[part, None].double() / TEMPERATURE
        d_hidden[part] = d_logits @ weight
        d_weight += d_logits.t() @ hidden[part]
    return log_probs, entropies, d_hidden, d_weight
