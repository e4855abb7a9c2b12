"""The sampling parameters of a request, and the sampler. Shape: V vocabulary."""

from typing import Annotated

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


class Sampler:
    """Samples the tokens of one response: the n-th token uses the n-th random number of the request's seed."""

    def __init__(self, parameters: SamplingParameters) -> None:
        seed = parameters.sampling_seed
        self._generator = torch.Generator().manual_seed(DEFAULT_SEED if seed is None else seed % 2**63)
        self._parameters = parameters
        self._is_greedy = parameters.temperature < MIN_TEMPERATURE
        self._choose = self._among_the_likeliest if parameters.is_truncated else self._among_all

    def __call__(self, logits_V: Tensor) -> tuple[int, float]:
        """The token, and its log-prob in the untruncated distribution at the temperature (1 when greedy)."""
        if self._is_greedy:
            log_probs_V = logits_V.log_softmax(-1)
            token = int(log_probs_V.argmax())
        else:
            log_probs_V = (logits_V / self._parameters.temperature).log_softmax(-1)
            token = self._choose(log_probs_V.double().exp())
        return token, float(log_probs_V[token])

    def _among_all(self, probs_V: Tensor) -> int:
        return self._draw(probs_V)

    def _among_the_likeliest(self, probs_V: Tensor) -> int:
        """Top-k, then the most probable tokens as long as the sum of the tokens before is at most top_p, as in SGLang
        (layers/sampler.py, top_k_top_p_min_p_sampling_from_probs_torch)."""
        sorted_V, tokens_V = probs_V.sort(descending=True, stable=True)
        before_V = sorted_V.cumsum(0) - sorted_V
        kept = int((before_V <= self._parameters.top_p).sum())
        if self._parameters.top_k != -1:
            kept = min(kept, self._parameters.top_k)
        return int(tokens_V[self._draw(sorted_V[:kept])])

    def _draw(self, weights: Tensor) -> int:
        sums = weights.cumsum(0)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * sums[-1]
        # the product may be rounded up to the sum itself
        return min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)
