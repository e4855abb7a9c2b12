"""The control plane of rollout servers, blocking: the requests of the trainer's rank 0 that publish weights."""

import json
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Literal

import msgspec
import requests

from minpro_megatron.errors import ProjectError
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.answer_limits import MAX_CONTROL_BYTES, MAX_INFO_BYTES, read_body

# SGLang always keeps the most likely token, whatever top_p is. Unlike top_k = 1 or temperature 0, this value does not
# make SGLang treat the request as greedy: a batch of only greedy requests returns log-probs of temperature 1.
GREEDY_TOP_P = 1e-9

MemoryPart = Literal["weights", "kv_cache"]


class ControlError(ProjectError):
    """A server refused or failed a control request; the message names server, request and reason."""


class NoAnswerInTime(ControlError):
    """The server accepted the request but has not answered within the time limit."""


class WeightsChecksum(msgspec.Struct, frozen=True, kw_only=True):
    """Checksums of the weights on a server: one for the whole server, and one per tensor of each rank."""

    engine: str
    tensors: list[dict[str, str]]


class GreedyAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """A greedy continuation with its tokens' log-probs over the whole vocabulary at the requested temperature."""

    token_ids: list[int]
    log_probs: list[float]
    policy_version: int


class ServerControl:
    """Control requests to one server. Each raises ControlError unless the server reports success.

    With `vocabulary_size` given, prompts are checked against it: a larger token id would end the server.
    `headers` are sent with every request (see serving/api_key.py). An object must be used by one thread at a time.
    """

    def __init__(
        self,
        address: ServerAddress,
        timeout_s: float = 600.0,
        vocabulary_size: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._vocabulary_size = vocabulary_size
        self._headers = dict(headers or {})
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy between trainer and server
        # Minutes pass between two publications; a connection kept open might be closed during a request, and most
        # of these requests cannot be sent twice.
        self._session.headers["Connection"] = "close"
        self._session.headers.update(self._headers)

    def close(self) -> None:
        self._session.close()

    def within(self, timeout_s: float) -> "ServerControl":
        """A copy for the same server with another time limit per request."""
        return ServerControl(self.address, timeout_s, self._vocabulary_size, self._headers)

    def at_most(self, timeout_s: float) -> "ServerControl":
        """A copy for the same server with a time limit of at most `timeout_s`."""
        return self.within(min(timeout_s, self._timeout_s))

    def pause_generation(self, mode: Literal["in_place", "retract", "abort"]) -> None:
        """Stops generating; new requests wait. `in_place` keeps the KV cache of running requests."""
        self._post("pause_generation", {"mode": mode})

    def continue_generation(self) -> None:
        self._post("continue_generation", {})

    def abort_all_requests(self) -> None:
        """Ends running and waiting requests with the tokens they have: waiting ones at once, others after their next
        token."""
        self._post("abort_request", {"abort_all": True})

    def flush_cache(self) -> None:
        """Empties the prefix cache. The server refuses while requests run or are paused `in_place`."""
        self._post("flush_cache", {})

    def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
    ) -> None:
        """Joins the group as ranks rank_offset .. rank_offset + tensor_parallel - 1.

        Blocks until all `world_size` members have joined: call it on all servers at once (`start_for_all`)
        while the trainer joins as rank 0.
        """
        fields = {"master_address": master_address, "master_port": master_port, "rank_offset": rank_offset}
        fields |= {"world_size": world_size, "group_name": group_name, "backend": backend}
        self._post("init_weights_update_group", fields)

    def destroy_weights_update_group(self, *, group_name: str) -> None:
        self._post("destroy_weights_update_group", {"group_name": group_name})

    def begin_weight_update(self) -> None:
        self._post("begin_weight_update", {})

    def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: int | str,
        load_format: Literal["flattened_bucket"] | None = None,
        flush_cache: bool = False,
    ) -> None:
        """Receives the named tensors by broadcast from rank 0 of the group; blocks until they have arrived.

        Names are those of Hugging Face. An unknown name is accepted without effect: compare `weights_checksum`.
        """
        if not len(names) == len(dtypes) == len(shapes):
            raise ValueError(f"names, dtypes, shapes: lengths {len(names)}, {len(dtypes)}, {len(shapes)} must agree")
        fields = {"names": list(names), "dtypes": list(dtypes), "shapes": [list(shape) for shape in shapes]}
        fields |= {
            "group_name": group_name,
            "weight_version": str(weight_version),
            "flush_cache": flush_cache,
        }
        if load_format is not None:
            fields["load_format"] = load_format
        self._post("update_weights_from_distributed", fields)

    def update_weights_from_tensor(
        self, *, serialized_named_tensors: Sequence[str], weight_version: int | str, flush_cache: bool = False
    ) -> None:
        """Loads tensors from memory that this process shares with the server's processes, of the form that SGLang calls
        flattened_bucket: one message for each tensor-parallel rank; blocks until they are loaded.

        An unknown name is accepted without effect: compare `weights_checksum`.
        """
        fields = {
            "serialized_named_tensors": list(serialized_named_tensors),
            "load_format": "flattened_bucket",
            "weight_version": str(weight_version),
            "flush_cache": flush_cache,
        }
        self._post("update_weights_from_tensor", fields)

    def end_weight_update(self) -> None:
        self._post("end_weight_update", {})

    def update_weights_from_disk(self, *, model_path: str, weight_version: int, flush_cache: bool = True) -> None:
        """Loads a Hugging Face folder that the server can read; needs no begin and end calls."""
        fields = {"model_path": model_path, "weight_version": str(weight_version), "flush_cache": flush_cache}
        self._post("update_weights_from_disk", fields)

    def update_weight_version(self, *, weight_version: int) -> None:
        """Changes the version that the server reports for its weights; the weights do not change."""
        self._post("update_weight_version", {"new_version": str(weight_version), "abort_all_requests": False})

    def release_memory_occupation(self, *, tags: Sequence[MemoryPart]) -> None:
        """Frees these parts of the server's memory. A server that is not idle ends: see serving/handover.py."""
        self._post("release_memory_occupation", {"tags": list(tags)})

    def resume_memory_occupation(self, *, tags: Sequence[MemoryPart]) -> None:
        """Allocates these parts again. The weights are undefined until they are sent. A part that is not released ends
        the server."""
        self._post("resume_memory_occupation", {"tags": list(tags)})

    def weights_checksum(self) -> WeightsChecksum:
        """The checksums that the server computes over its current weights."""
        answer = self._post("weights_checker", {"action": "checksum"})
        try:
            tensors = [rank["checksums"] for rank in answer["ranks"]]
            found = {"engine": answer["per_engine_checksum"], "tensors": tensors}
            return msgspec.convert(found, WeightsChecksum)
        except (KeyError, TypeError, msgspec.ValidationError) as error:
            raise self._error("weights_checker", f"unexpected answer: {error}") from None

    def model_info(self) -> dict[str, Any]:
        """The server's description of its model; answers even while generation is paused."""
        return self._request("GET", "model_info", None)

    def policy_version(self) -> int:
        """The version of the weights that the server reports."""
        version = self.model_info().get("weight_version")
        try:
            return int(str(version))
        except ValueError:
            raise self._error("model_info", f"weight_version = {version!r} is not a policy version") from None

    def generate_greedy(self, token_ids: Sequence[int], num_tokens: int, temperature: float = 1.0) -> GreedyAnswer:
        """Exactly `num_tokens` greedy tokens after the prompt. Waits while generation is paused, and for earlier
        requests. The server is asked to abort a request that raises NoAnswerInTime."""
        size = self._vocabulary_size
        wrong = [token for token in token_ids if token < 0 or (size is not None and token >= size)]
        if wrong or not token_ids:
            raise ValueError(f"prompt token ids {wrong or 'are missing'}: they must be within the vocabulary of {size}")
        request_id = uuid.uuid4().hex
        request = {
            "rid": request_id,
            "input_ids": list(map(int, token_ids)),
            "sampling_params": {
                "max_new_tokens": num_tokens,
                "temperature": temperature,
                "top_p": GREEDY_TOP_P,
                "ignore_eos": True,
            },
            "return_logprob": True,
            # a separate prefix cache: the shared one may hold keys and values of earlier weights
            "extra_key": request_id,
        }
        try:
            answer = self._post("generate", request)
        except NoAnswerInTime:
            with suppress(ControlError):
                self._post("abort_request", {"rid": request_id})
            raise
        return self._greedy_answer(answer, num_tokens)

    def _greedy_answer(self, answer: Mapping[str, Any], num_tokens: int) -> GreedyAnswer:
        try:
            meta = answer["meta_info"]
            greedy = msgspec.convert(
                {
                    "token_ids": answer["output_ids"],
                    "log_probs": [entry[0] for entry in meta["output_token_logprobs"]],
                    "policy_version": int(meta["weight_version"]),
                },
                GreedyAnswer,
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._error("generate", f"unexpected answer: {error}") from None
        if not len(greedy.token_ids) == len(greedy.log_probs) == num_tokens:
            raise self._error(
                "generate",
                f"{len(greedy.token_ids)} tokens, {len(greedy.log_probs)} log-probs instead of {num_tokens}",
            )
        return greedy

    def _post(self, endpoint: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        return self._request("POST", endpoint, fields)

    def _request(self, method: str, endpoint: str, fields: Mapping[str, Any] | None) -> dict[str, Any]:
        limit_s = self._timeout_s
        limits = {"timeout": (min(10, limit_s), limit_s), "stream": True}
        try:
            with self._session.request(method, f"{self.address.url}/{endpoint}", json=fields, **limits) as response:
                body = read_body(response, MAX_INFO_BYTES if endpoint == "model_info" else MAX_CONTROL_BYTES)
        except requests.ReadTimeout:
            raise NoAnswerInTime(self._message(endpoint, f"no answer within {limit_s:g} s")) from None
        except requests.RequestException as error:
            raise self._error(endpoint, f"no answer: {error}") from None
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = {"message": body.decode(errors="replace").strip()}
        if not isinstance(answer, dict):
            answer = {"message": str(answer)}
        if response.status_code != HTTPStatus.OK or answer.get("success") is False:
            reason = answer.get("error") or answer.get("message") or response.reason
            reason = reason.get("message", reason) if isinstance(reason, dict) else reason
            raise self._error(endpoint, f"status {response.status_code}: {str(reason)[:500]}")
        return answer

    def _error(self, endpoint: str, reason: str) -> ControlError:
        return ControlError(self._message(endpoint, reason))

    def _message(self, endpoint: str, reason: str) -> str:
        return f"server {self.address.index} at {self.address.url}, {endpoint}: {reason}"
