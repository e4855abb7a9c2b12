"""A running response, and its final answer in SGLang's format."""

import base64
import time
from concurrent.futures import Future
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from minpro_megatron.reference_engine.model import KeyValueCache
from minpro_megatron.reference_engine.sampling import Sampled, Sampler, SamplingParameters


class Response:
    """Prompt and sampled tokens. `answer` gets the JSON object for the client; the waiting handler may cancel it."""

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        sampling: SamplingParameters,
        stop_token_ids: frozenset[int],
        *,
        with_log_probs: bool = False,
        routes_from: int | None = None,
        with_kept_ids: bool = False,
    ) -> None:
        """`routes_from`: return the experts of the tokens from this index on; None: of no token. `with_kept_ids`:
        return the ids that truncated sampling kept, and the log-probs among them."""
        self.request_id = request_id
        self.answer: Future[dict[str, Any]] = Future()
        self.tokens = list(prompt)
        self.num_prompt_tokens = len(prompt)
        self.cache: KeyValueCache | None = None
        self._begin = time.monotonic()
        self._sampler = Sampler(sampling)
        self._max_tokens = len(prompt) + sampling.max_new_tokens
        self._stops = frozenset() if sampling.ignore_eos else stop_token_ids.union(sampling.stop_token_ids or ())
        self._with_log_probs = with_log_probs
        self._routes_from = routes_from
        self._with_kept_ids = with_kept_ids
        self._sampled: list[Sampled] = []
        self._versions: list[str] = []
        self._num_retractions = 0

    @property
    def prompt(self) -> tuple[int, ...]:
        return tuple(self.tokens[: self.num_prompt_tokens])

    @property
    def capacity(self) -> int:
        """The number of tokens that the cache must hold: the last sampled token never goes through the model."""
        return self._max_tokens - 1

    def sample(self, logits_V: torch.Tensor, version: str) -> dict[str, Any] | None:
        """Adds a token sampled with weights of `version`. Returns the finish reason if it was the last token."""
        sampled = self._sampler.sample(logits_V)
        token = sampled.token
        self.tokens.append(token)
        self._sampled.append(sampled)
        self._versions.append(version)
        if len(self.tokens) == self._max_tokens:  # first, as in SGLang: also if the last token is a stop token
            return {"type": "length", "length": len(self._sampled)}
        return {"type": "stop", "matched": token} if token in self._stops else None

    def retract(self) -> None:
        """Frees keys and values: they are computed again later, with the weights of that time."""
        self._num_retractions += self.cache is not None
        self.cache = None

    def finish(self, reason: dict[str, Any], version: str) -> None:
        answer = self._answer(reason, version)
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_result(answer)

    def abort(self, version: str) -> None:
        """Ends the response with its tokens so far. A response that is waiting, as after a retraction, returns no
        tokens: the experts of its tokens are lost with the cache."""
        if self.cache is not None and self.cache.num_tokens == len(self.tokens) - 1:
            self.finish({"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}, version)
            return
        del self.tokens[self.num_prompt_tokens :], self._sampled[:], self._versions[:]
        self.finish({"type": "abort", "message": "Abort in waiting queue"}, version)

    def fail(self, error: Exception) -> None:
        if self.answer.set_running_or_notify_cancel():
            self.answer.set_exception(error)

    def _answer(self, reason: dict[str, Any], version: str) -> dict[str, Any]:
        sampled = self.tokens[self.num_prompt_tokens :]
        meta: dict[str, Any] = {
            "id": self.request_id,
            "finish_reason": reason,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": len(sampled),
            "weight_version": version,
            "weight_versions": _spans(self._versions),
            "num_retractions": self._num_retractions,
            "e2e_latency": time.monotonic() - self._begin,
        }
        if self._with_log_probs:
            entries = [(one.log_prob, one.token, None) for one in self._sampled]
            meta |= {"input_token_logprobs": [], "output_token_logprobs": entries}
            meta["output_token_logprobs_length"] = len(entries)
        if self._with_kept_ids:
            meta["output_token_sampling_mask"] = [one.kept_ids for one in self._sampled]
            meta["output_token_sampling_logprobs"] = [one.kept_log_prob for one in self._sampled]
            meta["output_token_sampling_mask_length"] = len(self._sampled)
        if self._routes_from is not None and self.cache is not None and self.cache.routes_K:
            meta["routed_experts"] = _encoded_routes(self.cache, self._routes_from)
        return {"output_ids": sampled, "meta_info": meta}


def _spans(versions: list[str]) -> list[dict[str, Any]]:
    """[{version, start, end}]: one span for each run of equal versions."""
    changes = [i for i, version in enumerate(versions) if i == 0 or version != versions[i - 1]]
    bounds = pairwise([*changes, len(versions)])
    return [{"version": versions[start], "start": start, "end": end} for start, end in bounds]


def _encoded_routes(cache: KeyValueCache, first: int) -> str:
    """Base64 of int32, little endian, [tokens, layers, K], from token `first` on; the last sampled token has none."""
    routes = torch.stack(cache.routes_K).view(cache.num_tokens, len(cache.layers), -1)[first:]
    return base64.b64encode(routes.numpy().astype(np.dtype("<i4")).tobytes()).decode("ascii")
