"""The sampling parameters of a request, and the sampler. Shape: V vocabulary."""

from typing import Annotated, NamedTuple

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

DEFAULT_SEED = 42  # SGLang's default in deterministic sampling, for requests without a seed
# Below this SGLang samples greedily (sampling_params.py, _SAMPLING_EPS).
MIN_TEMPERATURE = 1e-6


class SamplingParameters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """SGLang's `sampling_params` with its defaults, limited to what this engine supports."""

    max_new_tokens: Annotated[int, Meta(ge=1)] = 128
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: int = -1  # -1: all
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    sampling_seed: Annotated[int, Meta(ge=0)] | None = None
    skip_special_tokens: bool = True  # without effect: there is no text here
    n: Annotated[int, Meta(ge=1, le=1)] = 1

    def __post_init__(self) -> None:
        if self.top_k != -1 and self.top_k < 1:
            raise ValueError(f"top_k must be -1 (disable) or at least 1, got {self.top_k}")

    @property
    def is_truncated(self) -> bool:
        return self.top_p < 1 or self.top_k != -1


class Sampled(NamedTuple):
    """A token, and its log-prob in the untruncated distribution at the temperature (1 when greedy). `kept_ids` are
    those that truncation or greedy sampling leaves, the likeliest first, and `kept_log_prob` is that among them."""

    token: int
    log_prob: float
    kept_ids: list[int]
    kept_log_prob: float


class Sampler:
    """Samples the tokens of one response: the n-th token uses the n-th random number of the request's seed."""

    def __init__(self, parameters: SamplingParameters) -> None:
        seed = parameters.sampling_seed
        self._generator = torch.Generator().manual_seed(DEFAULT_SEED if seed is None else seed % 2**63)
        self._parameters = parameters
        self._is_greedy = parameters.temperature < MIN_TEMPERATURE

    def __call__(self, logits_V: Tensor) -> tuple[int, float]:
        """The token and its log-prob, as Sampled has them."""
        sampled = self.sample(logits_V)
        return sampled.token, sampled.log_prob

    def sample(self, logits_V: Tensor) -> Sampled:
        """Without truncation `kept_ids` is empty, and both log-probs are the same."""
        if self._is_greedy:
            log_probs_V = logits_V.log_softmax(-1)
            token = int(log_probs_V.argmax())
            return Sampled(token, float(log_probs_V[token]), [token], 0.0)
        log_probs_V = (logits_V / self._parameters.temperature).log_softmax(-1)
        probs_V = log_probs_V.double().exp()
        if not self._parameters.is_truncated:
            token = self._draw(probs_V)
            log_prob = float(log_probs_V[token])
            return Sampled(token, log_prob, [], log_prob)
        weights, ids = self._likeliest(probs_V)
        place = self._draw(weights)
        token, kept_log_prob = int(ids[place]), float((weights[place] / weights.sum()).log())
        return Sampled(token, float(log_probs_V[token]), ids.tolist(), kept_log_prob)

    def _likeliest(self, probs_V: Tensor) -> tuple[Tensor, Tensor]:
        """(probabilities, ids) that top-k keeps, and of them the most probable ones as long as the sum of those before
        is at most top_p, as in SGLang (layers/sampler.py, top_k_top_p_min_p_sampling_from_probs_torch)."""
        sorted_V, tokens_V = probs_V.sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(0) - sorted_V
        kept = int((before_V <= self._parameters.top_p).sum())
        if self._parameters.top_k != -1:
            kept = min(kept, self._parameters.top_k)
        return sorted_V[:kept], tokens_V[:kept]

    def _draw(self, weights: Tensor) -> int:
        sums = weights.cumsum(0)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * sums[-1]
        # the product may be rounded up to the sum itself
        return min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)
