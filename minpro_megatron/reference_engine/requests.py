"""The bodies of requests, with SGLang's names and defaults, and the responses that a request needs."""

import uuid
from typing import Literal

import msgspec

from minpro_megatron.reference_engine.responses import Response
from minpro_megatron.reference_engine.sampling import SamplingParameters

MAX_KEPT_IDS = 4096  # SGLang's default of --sampling-mask-max-tokens


class Refused(Exception):
    """Status 400 with this message as SGLang's `error`."""


class Generate(msgspec.Struct):
    input_ids: list[int | list[int]]
    sampling_params: SamplingParameters | list[SamplingParameters] = msgspec.field(default_factory=SamplingParameters)
    rid: str | list[str] | None = None
    return_logprob: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0
    return_sampling_mask: bool = False
    stream: Literal[False] = False


class Abort(msgspec.Struct):
    rid: str = ""
    abort_all: bool = False


class Pause(msgspec.Struct):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class InitGroup(msgspec.Struct):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class DestroyGroup(msgspec.Struct):
    group_name: str = "weight_update_group"


class FromDistributed(msgspec.Struct):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    group_name: str = "weight_update_group"
    flush_cache: bool = True
    weight_version: str | None = None
    load_format: Literal["flattened_bucket"] | None = None


class FromTensor(msgspec.Struct):
    serialized_named_tensors: list[str]
    load_format: Literal["flattened_bucket"]
    flush_cache: bool = True
    weight_version: str | None = None


class FromDisk(msgspec.Struct):
    model_path: str
    flush_cache: bool = True
    weight_version: str | None = None


class UpdateVersion(msgspec.Struct):
    new_version: str
    abort_all_requests: bool = True


class CheckWeights(msgspec.Struct):
    action: Literal["checksum"]


class ResponseMaker:
    """Makes the responses of a request, or refuses what the model cannot do."""

    def __init__(self, vocabulary_size: int, stop_token_ids: frozenset[int], context_length: int) -> None:
        self._vocabulary_size = vocabulary_size
        self._stop_token_ids = stop_token_ids
        self._context_length = context_length

    def __call__(self, asked: Generate) -> list[Response]:
        """One response per prompt. Raises Refused."""
        prompts = [prompt for prompt in asked.input_ids if isinstance(prompt, list)]
        if not prompts:
            prompts = [[token for token in asked.input_ids if isinstance(token, int)]]
        elif len(prompts) != len(asked.input_ids):
            raise Refused("input_ids must be token ids, or lists of token ids.")
        sampling = asked.sampling_params
        if isinstance(sampling, SamplingParameters):
            sampling = [sampling] * len(prompts)
        request_ids = [asked.rid] if isinstance(asked.rid, str) else asked.rid
        request_ids = request_ids or [uuid.uuid4().hex for _ in prompts]
        if not len(prompts) == len(sampling) == len(request_ids):
            raise Refused(f"{len(prompts)} input_ids, {len(sampling)} sampling_params and {len(request_ids)} rid.")
        for prompt, parameters in zip(prompts, sampling, strict=True):
            self._check(prompt, parameters, asked.routed_experts_start_len)
            _check_kept_ids(parameters, asked.return_sampling_mask)
        return [
            Response(
                request_id,
                prompt,
                parameters,
                self._stop_token_ids,
                with_log_probs=asked.return_logprob,
                routes_from=asked.routed_experts_start_len if asked.return_routed_experts else None,
                with_kept_ids=asked.return_sampling_mask,
            )
            for request_id, prompt, parameters in zip(request_ids, prompts, sampling, strict=True)
        ]

    def _check(self, prompt: list[int], parameters: SamplingParameters, routes_from: int) -> None:
        size, limit = self._vocabulary_size, self._context_length
        if not prompt:
            raise Refused("input_ids cannot be empty.")
        if min(prompt) < 0 or max(prompt) >= size:
            raise Refused(f"input_ids contain a token id outside the vocabulary of {size}.")
        total = len(prompt) + parameters.max_new_tokens
        if total > limit:
            raise Refused(
                f"Requested token count exceeds the model's maximum context length of {limit} tokens. You requested a "
                f"total of {total} tokens: {len(prompt)} tokens from the input messages and "
                f"{parameters.max_new_tokens} tokens for the completion."
            )
        if not 0 <= routes_from <= len(prompt):
            raise Refused(f"routed_experts_start_len={routes_from} must lie within the {len(prompt)} input tokens.")


def _check_kept_ids(parameters: SamplingParameters, are_wanted: bool) -> None:
    """SGLang refuses this request in its scheduler (managers/scheduler.py), with the same message."""
    top_k = parameters.top_k
    if are_wanted and not 1 <= top_k <= MAX_KEPT_IDS:
        raise Refused(
            f"return_sampling_mask requires top_k=1 for greedy sampling or finite 1 < top_k <= {MAX_KEPT_IDS}; got "
            f"top_k={top_k}."
        )
