"""The data plane: token ids in; sampled tokens, log-probs and policy versions out, every answer checked."""

import asyncio
import logging
import math
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
import msgspec
import numpy as np

from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.model_files import ModelFacts

log = logging.getLogger(__name__)

# Attempts at one request while its server drops connections or answers 5xx, and the first pause between them.
MAX_ATTEMPTS = 5
FIRST_PAUSE_S = 0.2
# Rounding may lift the log-prob of a certain token above 0 by a few units in the last place.
LARGEST_LOG_PROB = 1e-5


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the tokens of a request are sampled. Training requests keep top_p at 1."""

    temperature: float
    max_response_tokens: int
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class SampledSequence:
    """One sampled continuation: arrays over its tokens, the stop token included if there was one."""

    token_ids: np.ndarray  # int32
    log_probs: np.ndarray  # float32, of the untruncated distribution at the sampling temperature
    policy_versions: np.ndarray  # int32
    finish_reason: str  # "stop" or "length"


class ServerError(RuntimeError):
    """A request to a rollout server failed; the message names the server, the request and the field."""

    def __init__(self, server: str, request_id: str, field: str, problem: str) -> None:
        self.server, self.request_id, self.field, self.problem = server, request_id, field, problem
        super().__init__(f"{server}, request {request_id}, {field}: {problem}")


class ServerUnavailable(ServerError):
    """No answer, also after retries: connection refused or dropped, time limit exceeded, status 5xx."""


class RequestRefused(ServerError):
    """The server called the request wrong (status 4xx): sending it again cannot help."""


class InvalidAnswer(ServerError):
    """The answer is damaged or does not fit the request."""


class WrongPolicyVersion(ServerError):
    """A token was sampled with other weights than the request asked for."""


class _FinishReason(msgspec.Struct):
    type: str


class _VersionSpan(msgspec.Struct):
    version: str
    start: int
    end: int


class _MetaInfo(msgspec.Struct):
    id: str
    finish_reason: _FinishReason
    # An aborted request lacks some of these; the check of finish_reason comes first and names the cause.
    output_token_logprobs: list[tuple[float, int, str | None]] = []
    weight_versions: list[_VersionSpan] = []
    prompt_tokens: int = -1
    completion_tokens: int = -1


class _Answer(msgspec.Struct):
    output_ids: list[int]
    meta_info: _MetaInfo


_DECODER = msgspec.json.Decoder(list[_Answer])


class ServerClient:
    """Generation requests to one server; use inside `async with`."""

    def __init__(self, address: ServerAddress, facts: ModelFacts, request_timeout_s: float) -> None:
        self.address = address
        self.name = f"server {address.index} at {address.url}"
        self._facts = facts
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s, sock_connect=10)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "ServerClient":
        # No limit on connections here: whoever dispatches the groups decides how many requests are under way.
        self._session = aiohttp.ClientSession(timeout=self._timeout, connector=aiohttp.TCPConnector(limit=0))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def generate(
        self,
        prompt_token_ids: Sequence[int] | np.ndarray,
        seeds: Sequence[int],
        sampling: SamplingParameters,
        policy_version: int,
    ) -> list[SampledSequence]:
        """One continuation of the prompt for each seed, all sampled with the weights of `policy_version`.

        Dropped connections and 5xx are tried again up to MAX_ATTEMPTS times. Raises a ServerError
        otherwise, and ValueError for a prompt that must not be sent: a token id outside the vocabulary
        would end the server.
        """
        prompt = [int(token) for token in prompt_token_ids]
        if not prompt or min(prompt) < 0 or max(prompt) >= self._facts.vocabulary_size:
            raise ValueError(
                f"prompt token ids {prompt[:20]}: there must be one at least, all within the model's "
                f"vocabulary of {self._facts.vocabulary_size}; tokenizer and model do not belong together"
            )
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, MAX_ATTEMPTS + 1):
            # Fresh ids each time: the server may still hold the request whose connection broke. All have
            # one length, because SGLang aborts every request whose id starts with the given one.
            request_ids = [uuid.uuid4().hex for _ in seeds]
            try:
                body = await self._post(self._request(prompt, seeds, sampling, request_ids), request_ids)
            except ServerUnavailable as error:
                if attempt == MAX_ATTEMPTS or isinstance(error.__cause__, TimeoutError):
                    raise
                log.warning("%s; attempt %d of %d failed, trying again", error, attempt, MAX_ATTEMPTS)
                await asyncio.sleep(pause_s)
                pause_s *= 2
            else:
                return self._checked(body, request_ids, len(prompt), sampling, policy_version)
        raise AssertionError("the last attempt returns or raises")

    async def policy_version(self) -> int:
        """The version of the weights the server holds, by its own account. Raises ServerError."""
        assert self._session is not None, "use `async with` around the client"
        try:
            async with self._session.get(f"{self.address.url}/model_info") as response:
                info = msgspec.json.decode(await response.read(), type=dict)
                return int(info["weight_version"])
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerUnavailable(self.name, "model_info", "connection", _named(error)) from error
        except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
            raise InvalidAnswer(self.name, "model_info", "weight_version", _named(error)) from error

    def _request(
        self, prompt: list[int], seeds: Sequence[int], sampling: SamplingParameters, request_ids: list[str]
    ) -> bytes:
        # One request with a list of prompts, not n > 1: only so each response has a seed of its own.
        shared = {
            "max_new_tokens": sampling.max_response_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(self._facts.stop_token_ids),
            "ignore_eos": False,
            "skip_special_tokens": False,
        }
        return msgspec.json.encode(
            {
                "rid": request_ids,
                "input_ids": [prompt] * len(request_ids),
                "sampling_params": [{**shared, "sampling_seed": seed} for seed in seeds],
                "return_logprob": True,
            }
        )

    async def _post(self, request: bytes, request_ids: list[str]) -> bytes:
        assert self._session is not None, "use `async with` around the client"
        headers = {"Content-Type": "application/json"}
        try:
            async with self._session.post(f"{self.address.url}/generate", data=request, headers=headers) as response:
                body = await response.read()
        except aiohttp.ConnectionTimeoutError as error:
            raise ServerUnavailable(self.name, request_ids[0], "connection", _named(error)) from None
        except TimeoutError as error:
            await self._abort(request_ids)
            problem = f"no answer within the time limit of server.request_timeout_s = {self._timeout.total:g} s"
            raise ServerUnavailable(self.name, request_ids[0], "connection", problem) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerUnavailable(self.name, request_ids[0], "connection", _named(error)) from error
        if response.status == 200:
            return body
        kind = RequestRefused if 400 <= response.status < 500 else ServerUnavailable
        shown = body[:500].decode("utf-8", errors="replace")
        raise kind(self.name, request_ids[0], "status", f"{response.status} {response.reason}: {shown}")

    async def _abort(self, request_ids: list[str]) -> None:
        """Frees the server of requests nobody waits for any more; best effort."""
        assert self._session is not None
        limit = aiohttp.ClientTimeout(total=2)
        for request_id in request_ids:
            with suppress(aiohttp.ClientError, TimeoutError, OSError):
                fields = {"rid": request_id}
                async with self._session.post(f"{self.address.url}/abort_request", json=fields, timeout=limit):
                    pass

    def _checked(
        self,
        body: bytes,
        request_ids: list[str],
        num_prompt_tokens: int,
        sampling: SamplingParameters,
        policy_version: int,
    ) -> list[SampledSequence]:
        try:
            answers = _DECODER.decode(body)
        except msgspec.DecodeError as error:
            # msgspec's message ends with the place, such as "at `$[0].meta_info.finish_reason`".
            field = str(error).rpartition("`$")[2].rstrip("`").lstrip(".") if "`$" in str(error) else "body"
            problem = f"{error} in {body[:200]!r}" if field == "body" else str(error)
            raise InvalidAnswer(self.name, request_ids[0], field, problem) from None
        if len(answers) != len(request_ids):
            problem = f"{len(answers)} answers to {len(request_ids)} requests"
            raise InvalidAnswer(self.name, request_ids[0], "body", problem)
        return [
            self._checked_one(answer, request_id, num_prompt_tokens, sampling, policy_version)
            for answer, request_id in zip(answers, request_ids, strict=True)
        ]

    def _checked_one(
        self,
        answer: _Answer,
        request_id: str,
        num_prompt_tokens: int,
        sampling: SamplingParameters,
        policy_version: int,
    ) -> SampledSequence:
        meta, tokens = answer.meta_info, answer.output_ids
        num_tokens, stops = len(tokens), self._facts.stop_token_ids

        def require(holds: bool, field: str, problem: str) -> None:
            if not holds:
                raise InvalidAnswer(self.name, request_id, field, problem)

        require(meta.id == request_id, "meta_info.id", f"answers request {meta.id!r}")
        reason = meta.finish_reason.type
        require(reason in ("stop", "length"), "meta_info.finish_reason", f"{reason!r} is neither stop nor length")
        require(
            meta.prompt_tokens == num_prompt_tokens,
            "meta_info.prompt_tokens",
            f"{meta.prompt_tokens} for a prompt of {num_prompt_tokens}",
        )
        require(num_tokens > 0, "output_ids", "no tokens")
        require(
            meta.completion_tokens == num_tokens,
            "meta_info.completion_tokens",
            f"{meta.completion_tokens} for {num_tokens} output_ids",
        )
        limit = sampling.max_response_tokens
        require(num_tokens <= limit, "output_ids", f"{num_tokens} tokens exceed max_new_tokens = {limit}")
        size = self._facts.vocabulary_size
        require(
            min(tokens) >= 0 and max(tokens) < size,
            "output_ids",
            f"a token id outside the vocabulary of {size}",
        )
        require(
            [entry[1] for entry in meta.output_token_logprobs] == tokens,
            "meta_info.output_token_logprobs",
            f"{len(meta.output_token_logprobs)} entries do not name the {num_tokens} output_ids",
        )
        log_probs = [entry[0] for entry in meta.output_token_logprobs]
        wrong = [value for value in log_probs if not math.isfinite(value) or value > LARGEST_LOG_PROB]
        require(not wrong, "meta_info.output_token_logprobs", f"{wrong[:3]} are no log-probs")
        require(
            not any(token in stops for token in tokens[:-1]),
            "output_ids",
            "tokens follow a stop token",
        )
        # A stop token in the last allowed place ends the response just as well, but SGLang reports "length"
        # there.
        stopped = tokens[-1] in stops
        require(
            stopped or reason == "length",
            "meta_info.finish_reason",
            "stop, but the last token is no stop token",
        )
        require(
            stopped or num_tokens == limit,
            "meta_info.finish_reason",
            f"length after {num_tokens} tokens instead of {limit}: context or KV cache too small",
        )
        return SampledSequence(
            token_ids=np.asarray(tokens, dtype=np.int32),
            log_probs=np.asarray(log_probs, dtype=np.float32),
            policy_versions=self._versions(meta.weight_versions, num_tokens, request_id, policy_version),
            finish_reason="stop" if stopped else "length",
        )

    def _versions(self, spans: list[_VersionSpan], num_tokens: int, request_id: str, policy_version: int) -> np.ndarray:
        field = "meta_info.weight_versions"
        versions = np.empty(num_tokens, dtype=np.int32)
        covered = 0
        for span in spans:
            if not (span.version.isascii() and span.version.isdigit() and len(span.version) < 10):
                raise InvalidAnswer(self.name, request_id, field, f"{span.version!r} is no policy version")
            if span.start != covered or not span.start < span.end <= num_tokens:
                break
            versions[span.start : span.end] = int(span.version)
            covered = span.end
        if covered != num_tokens:
            shown = [(span.version, span.start, span.end) for span in spans[:5]]
            raise InvalidAnswer(self.name, request_id, field, f"{shown} do not cover the {num_tokens} tokens in order")
        if (versions != policy_version).any():
            found = sorted(set(versions.tolist()))
            problem = f"sampled with version {found} instead of {policy_version}"
            raise WrongPolicyVersion(self.name, request_id, field, problem)
        return versions


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
