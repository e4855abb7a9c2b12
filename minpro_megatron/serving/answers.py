"""A server's answer to a group's requests: decoded, with every field checked before it is used.

Nothing here blocks on input or output, so a large answer can be checked in another process (answer_processes.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from minpro_megatron.batching.supports import joined_supports, largest_support
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.records import Turn
from minpro_megatron.serving.answer_arrays import Requirement, checked_log_probs, checked_routes, checked_supports
from minpro_megatron.serving.errors import InvalidAnswer, WrongPolicyVersion

ABORTED = "abort"


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One sampled continuation: arrays over its tokens, including the stop token if there was one."""

    token_ids: np.ndarray  # int32
    # float32, at the sampling temperature: of the distribution that was sampled from, which with truncated sampling of
    # training responses is that of the kept ids; evaluations have those of the untruncated one
    log_probs: np.ndarray
    policy_versions: np.ndarray  # int32
    finish_reason: str  # "stop", "length", or "abort" for a part that the server returned unfinished
    # uint8 or int16 [prompt tokens + tokens - 1, layers, experts per token]; None if they were not requested
    routed_experts: np.ndarray | None = None
    supports: np.ndarray | None = None  # int32, in the form of batching/supports.py; None if they were not requested
    # of an episode (fleet/episodes.py)
    loss_mask: np.ndarray | None = None  # uint8: 1 for sampled tokens, 0 for given ones; None: all are sampled
    turns: tuple[Turn, ...] = ()
    failure: str = ""  # why its environment failed: the group must not be trained on


@dataclass(frozen=True, slots=True)
class SentRequest:
    """The properties that an answer must fit: its id, the tokens sent, the maximum number of new tokens, the oldest
    version allowed, whether it must include the experts of its tokens, and the top_k with which it must include the
    kept ids of its tokens (0: without them)."""

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    policy_version: int
    with_routes: bool = False
    top_k: int = 0


class _FinishReason(msgspec.Struct):
    type: str


class _VersionSpan(msgspec.Struct):
    version: str
    start: int
    end: int


# There are millions of these per step. gc=False: otherwise each would bring the next garbage collection closer.
class _TokenLogProb(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    log_prob: float
    token_id: int
    text: str | None


class _MetaInfo(msgspec.Struct):
    id: str
    finish_reason: _FinishReason
    # An aborted request lacks some of these.
    output_token_logprobs: list[_TokenLogProb] = []
    weight_versions: list[_VersionSpan] = []
    prompt_tokens: int | None = None
    completion_tokens: int = -1
    num_retractions: int = 0
    routed_experts: bytes | None = None  # base64 of int32
    output_token_sampling_mask: list[list[int]] = []  # the kept ids of each token
    output_token_sampling_logprobs: list[float] = []  # of the softmax over them


class _Answer(msgspec.Struct):
    output_ids: list[int]
    meta_info: _MetaInfo


# Of a body that is no JSON, has text that is no UTF-8, or is nested very deeply.
NOT_DECODED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
# First the list, then each answer separately, so that an error names the request.
_LIST_DECODER = msgspec.json.Decoder(list[msgspec.Raw])
_DECODER = msgspec.json.Decoder(_Answer)


class AnswerChecker:
    """Checks the answers of one server.

    `exact_versions`: every token must have exactly the requested version (delay mode); otherwise versions may increase
    within a response (bounded mode).
    """

    def __init__(self, server: str, facts: ModelFacts, exact_versions: bool) -> None:
        self.server, self.exact_versions = server, exact_versions
        self._facts = facts
        self._check_versions = self._exact if exact_versions else self._rising
        self._route_bytes = 6 * facts.num_layers * facts.experts_per_token  # per token, in base64

    def largest_body(self, requests: Sequence[SentRequest]) -> int:
        """An upper bound for the bytes of a valid answer to the requests."""
        return sum(self._largest_answer(request) for request in requests)

    def _largest_answer(self, request: SentRequest) -> int:
        route_bytes = self._route_bytes * (request.num_prompt_tokens + request.max_tokens)
        id_bytes = len(str(self._facts.vocabulary_size)) + 2  # with a comma and a space
        support_bytes = (largest_support(request.top_k) * id_bytes + 32) * request.max_tokens
        return (
            16384
            + 256 * request.max_tokens
            + (route_bytes if request.with_routes else 0)
            + (support_bytes if request.top_k else 0)
        )

    def check(self, body: bytes | bytearray, requests: Sequence[SentRequest]) -> list[SampledSequence]:
        """The answers in the order of the requests. Raises InvalidAnswer naming the first wrong field."""
        try:
            parts = _LIST_DECODER.decode(body)
        except NOT_DECODED as error:
            raise InvalidAnswer(
                self.server, requests[0].request_id, "body", f"{error} in {bytes(body[:200])!r}"
            ) from None
        if len(parts) != len(requests):
            problem = f"{len(parts)} answers to {len(requests)} requests"
            raise InvalidAnswer(self.server, requests[0].request_id, "body", problem)
        return [
            self._check_one(self._decoded(part, place, request), request)
            for place, (part, request) in enumerate(zip(parts, requests, strict=True))
        ]

    def _decoded(self, part: msgspec.Raw, place: int, request: SentRequest) -> _Answer:
        try:
            return _DECODER.decode(part)
        except NOT_DECODED as error:
            # msgspec's message ends with the location, such as "at `$.meta_info.finish_reason`".
            path = str(error).rpartition("`$")[2].rstrip("`") if "`$" in str(error) else ""
            raise InvalidAnswer(self.server, request.request_id, f"[{place}]{path}", str(error)) from None

    def _check_one(self, answer: _Answer, request: SentRequest) -> SampledSequence:
        meta, num_tokens = answer.meta_info, len(answer.output_ids)
        reason = meta.finish_reason.type
        require = Requirement(self.server, request.request_id)
        require(meta.id == request.request_id, "meta_info.id", f"answers request {meta.id!r}")
        require(
            reason in ("stop", "length", ABORTED),
            "meta_info.finish_reason",
            f"{reason!r} is neither stop nor length nor abort",
        )
        if reason == ABORTED and not num_tokens:  # aborted in the queue: most fields are missing
            return _nothing_sampled()
        self._check_lengths(meta, num_tokens, request, require)
        tokens, log_probs = self._arrays(answer, require)
        versions = self._versions(meta.weight_versions, num_tokens, request)
        finish_reason, routes = self._finish_reason(tokens, reason, request.max_tokens, require), None
        if request.with_routes:
            routes = checked_routes(
                meta.routed_experts, request.num_prompt_tokens + num_tokens - 1, self._facts, require
            )
            if self._routes_are_lost(meta, versions):
                return _nothing_sampled()
        supports = None
        if request.top_k:
            kept, among_kept = meta.output_token_sampling_mask, meta.output_token_sampling_logprobs
            supports = checked_supports(kept, tokens, request.top_k, self._facts.vocabulary_size, require)
            log_probs = checked_log_probs(among_kept, num_tokens, "meta_info.output_token_sampling_logprobs", require)
        return SampledSequence(tokens, log_probs, versions, finish_reason, routes, supports)

    @staticmethod
    def _routes_are_lost(meta: _MetaInfo, versions: np.ndarray) -> bool:
        """A server that runs out of KV cache retracts a response and computes it again. If its weights have changed
        since the start of the response, the experts of its first tokens are lost, and it must be sampled again."""
        return meta.num_retractions > 0 and versions[0] != versions[-1]

    def _check_lengths(self, meta: _MetaInfo, num_tokens: int, request: SentRequest, require: Requirement) -> None:
        limit, num_entries = request.max_tokens, len(meta.output_token_logprobs)
        require(
            meta.prompt_tokens == request.num_prompt_tokens,
            "meta_info.prompt_tokens",
            f"{meta.prompt_tokens} for a prompt of {request.num_prompt_tokens}",
        )
        require(num_tokens > 0, "output_ids", "no tokens")
        require(
            meta.completion_tokens == num_tokens,
            "meta_info.completion_tokens",
            f"{meta.completion_tokens} for {num_tokens} output_ids",
        )
        require(num_tokens <= limit, "output_ids", f"{num_tokens} tokens exceed max_new_tokens = {limit}")
        require(
            num_entries == num_tokens,
            "meta_info.output_token_logprobs",
            f"{num_entries} entries for {num_tokens} output_ids",
        )

    def _arrays(self, answer: _Answer, require: Requirement) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and log-probs. As whole arrays, not token by token: a group may have 300,000 tokens."""
        field, size = "meta_info.output_token_logprobs", self._facts.vocabulary_size
        tokens = np.asarray(answer.output_ids)
        require(
            bool(tokens.min() >= 0 and tokens.max() < size),
            "output_ids",
            f"a token id outside the vocabulary of {size}",
        )
        entries = answer.meta_info.output_token_logprobs
        require([entry.token_id for entry in entries] == answer.output_ids, field, "they do not match the output_ids")
        return tokens.astype(np.int32), checked_log_probs(
            [entry.log_prob for entry in entries], len(tokens), field, require
        )

    def _finish_reason(self, tokens: np.ndarray, reason: str, limit: int, require: Requirement) -> str:
        is_stop = np.isin(tokens, self._facts.stop_token_ids)
        require(not is_stop[:-1].any(), "output_ids", "tokens follow a stop token")
        # A stop token in the last allowed position ends the response too, although SGLang then reports "length";
        # and a response may be complete at the moment in which it is aborted.
        if is_stop[-1]:
            return "stop"
        require(reason != "stop", "meta_info.finish_reason", "stop, but the last token is not a stop token")
        if len(tokens) == limit:
            return "length"
        require(
            reason == ABORTED,
            "meta_info.finish_reason",
            f"length after {len(tokens)} tokens instead of {limit}: context or KV cache too small",
        )
        return ABORTED

    def _versions(self, spans: list[_VersionSpan], num_tokens: int, request: SentRequest) -> np.ndarray:
        field = "meta_info.weight_versions"
        require = Requirement(self.server, request.request_id)
        versions = np.empty(num_tokens, dtype=np.int32)
        covered = 0
        for span in spans:
            is_version = span.version.isascii() and span.version.isdigit() and len(span.version) < 10
            require(is_version, field, f"{span.version!r} is not a policy version")
            if span.start != covered or not span.start < span.end <= num_tokens:
                break
            versions[span.start : span.end] = int(span.version)
            covered = span.end
        shown = [(span.version, span.start, span.end) for span in spans[:5]]
        require(covered == num_tokens, field, f"{shown} do not cover the {num_tokens} tokens in order")
        if problem := self._check_versions(versions, request.policy_version):
            raise WrongPolicyVersion(self.server, request.request_id, field, problem)
        return versions

    @staticmethod
    def _exact(versions: np.ndarray, version: int) -> str:
        if (versions == version).all():
            return ""
        return f"sampled with version {sorted(set(versions.tolist()))} instead of {version}"

    @staticmethod
    def _rising(versions: np.ndarray, version: int) -> str:
        if versions[0] >= version and (np.diff(versions) >= 0).all():
            return ""
        return f"sampled with versions {list(dict.fromkeys(versions.tolist()))}, which must rise from {version}"


def _nothing_sampled() -> SampledSequence:
    return SampledSequence(
        token_ids=np.empty(0, np.int32),
        log_probs=np.empty(0, np.float32),
        policy_versions=np.empty(0, np.int32),
        finish_reason=ABORTED,
    )


def joined(parts: Sequence[SampledSequence]) -> SampledSequence:
    """Joins the parts of a sequence, each of which except the last was continued by the next: because it was aborted,
    or because the next part was given by an environment or follows a given one.

    A position's routes are those of the request that processed it first: later requests, perhaps with other weights,
    only recompute it. Given parts have no routes of their own: the request after them processes them first.
    """
    sampled = [part for part in parts if len(part.token_ids)]
    if len(sampled) == 1:
        return sampled[0]
    routes, num_rows = [], 0
    for part in sampled:
        if part.routed_experts is not None:
            routes.append(part.routed_experts[num_rows:])
            num_rows = len(part.routed_experts)
    return SampledSequence(
        token_ids=np.concatenate([part.token_ids for part in sampled]),
        log_probs=np.concatenate([part.log_probs for part in sampled]),
        policy_versions=np.concatenate([part.policy_versions for part in sampled]),
        finish_reason=sampled[-1].finish_reason,
        routed_experts=np.concatenate(routes) if routes else None,
        supports=joined_supports([(len(part.token_ids), part.supports) for part in sampled]),
    )
