"""The data plane: sends token ids; returns sampled tokens, log-probs and policy versions, with every answer checked."""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import aiohttp
import msgspec
import numpy as np

from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import UserError
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.answer_limits import MAX_INFO_BYTES
from minpro_megatron.serving.answers import ABORTED, NOT_DECODED, AnswerChecker, SampledSequence, SentRequest, joined
from minpro_megatron.serving.errors import (
    WRONG_KEY,
    AnswerTimeout,
    InvalidAnswer,
    OutOfFiles,
    RequestRefused,
    ServerUnavailable,
    connection_error,
    named,
)

log = logging.getLogger(__name__)

# Attempts at one request while its server drops connections or answers 5xx, and the first pause between them.
# The number is small because the caller has other servers and monitors this one.
MAX_ATTEMPTS = 3
FIRST_PAUSE_S = 0.2
# Consecutive answers that add no token to a response before its server counts as unavailable. One is normal: an update
# in pause mode `abort` also returns requests that still wait in the server's queue.
MAX_EMPTY_ANSWERS = 20
# A server sends an answer once it is complete, so a body that takes longer than this will not arrive.
BODY_TIMEOUT_S = 120.0
# Answers of one server that are read or checked at a time: the others stay on the server, not in this process's memory.
MAX_ANSWERS_AT_ONCE = 2
CONNECT_TIMEOUT_S = 10.0
# External servers close idle connections after SGLang's 5 s.
KEEP_ALIVE_S = 4.0
ABORT_TIMEOUT_S = 2.0


Check = Callable[[AnswerChecker, bytes, Sequence[SentRequest]], Awaitable[list[SampledSequence]]]


async def check_here(checker: AnswerChecker, body: bytes, requests: Sequence[SentRequest]) -> list[SampledSequence]:
    """Checks an answer in this process and thread. For long responses use `AnswerProcesses.check`."""
    return checker.check(body, requests)


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the tokens of a request are sampled. `top_k` 0 means no limit.

    `with_routes`: the answer must include the experts that the model chose for each token (routing replay R3).
    `with_supports`: it must include the ids that top_k and top_p kept at each token; the log-probs are then those among
    them (support replay).
    `cache_key`: where weights change during requests, requests with the same key share their prefix cache.
    """

    temperature: float
    max_response_tokens: int
    top_p: float = 1.0
    with_routes: bool = False
    cache_key: str = ""
    top_k: int = 0
    with_supports: bool = False


class ServerClient:
    """Generation requests to one server; use inside `async with`.

    `request_timeout_s` is measured from sending a request to the last byte of its answer, so it includes the time in
    the server's own queue. `headers` are sent with every request (see serving/api_key.py); `exact_versions` is
    AnswerChecker's. `check` calls the checker, possibly in another process.
    """

    def __init__(
        self,
        address: ServerAddress,
        facts: ModelFacts,
        request_timeout_s: float,
        *,
        headers: Mapping[str, str] | None = None,
        exact_versions: bool = True,
        check: Check = check_here,
    ) -> None:
        self.address = address
        self.name = f"server {address.index} at {address.url}"
        self._facts = facts
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._headers = dict(headers or {})
        self._exact_versions = exact_versions
        self._checker = AnswerChecker(self.name, facts, exact_versions)
        self._session: aiohttp.ClientSession | None = None
        self._check = check
        self._room = asyncio.Semaphore(MAX_ANSWERS_AT_ONCE)
        self._aborts: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "ServerClient":
        # No limit on connections here: the dispatcher of groups limits the requests in flight.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*self._aborts)
        if self._session is not None:
            await self._session.close()

    async def generate(
        self,
        prompt_token_ids: Sequence[int] | np.ndarray,
        seeds: Sequence[int],
        sampling: SamplingParameters,
        policy_version: int,
        before_continuing: Callable[[], Awaitable[object]] | None = None,
    ) -> list[SampledSequence]:
        """One continuation of the prompt per seed, sampled with the weights of `policy_version`, or of it and later
        versions if the client was created for that.

        Responses that the server returns unfinished are continued once `before_continuing` has returned, with new
        requests that include the tokens so far. Dropped connections and 5xx are retried up to MAX_ATTEMPTS times.
        Raises a ServerError otherwise, and ValueError for a prompt that must not be sent: a token id outside the
        vocabulary would end the server.
        """
        prompt = [int(token) for token in prompt_token_ids]
        if not prompt or min(prompt) < 0 or max(prompt) >= self._facts.vocabulary_size:
            raise UserError(
                f"prompt token ids {prompt[:20]}: there must be at least one, all within the model's "
                f"vocabulary of {self._facts.vocabulary_size}; tokenizer and model do not belong together"
            )
        responses = [_Response(prompt, seed, sampling.max_response_tokens, policy_version) for seed in seeds]
        while unfinished := [response for response in responses if not response.is_finished]:
            if before_continuing is not None and any(response.parts for response in unfinished):
                await before_continuing()
            for response, part in zip(unfinished, await self._ask(unfinished, sampling), strict=True):
                response.add(part)
                if response.num_empty_answers > MAX_EMPTY_ANSWERS:
                    problem = f"aborted {response.num_empty_answers} times in a row without a token"
                    raise ServerUnavailable(self.name, "-", "aborted", problem)
        return [joined(response.parts) for response in responses]

    async def policy_version(self, timeout_s: float = 60.0) -> int:
        """The version of the weights that the server reports. Raises ServerError."""
        assert self._session is not None, "use `async with` around the client"
        limit = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.get(f"{self.address.url}/model_info", timeout=limit) as response:
                body = await self._small_body(response)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise AnswerTimeout(self.name, "model_info", "connection", named(error)) from error
            raise connection_error(self.name, "model_info", error) from error
        self._check_status(response, body, "model_info")
        try:
            return int(msgspec.json.decode(body, type=dict)["weight_version"])
        except (*NOT_DECODED, KeyError, TypeError, ValueError) as error:
            raise InvalidAnswer(self.name, "model_info", "weight_version", named(error)) from error

    async def generates(self, timeout_s: float) -> bool:
        """Whether the server's scheduler works: it has sent something, or one token of a request of its own, within
        `timeout_s`. False while generation is paused or weights are loaded. Raises OutOfFiles."""
        assert self._session is not None, "use `async with` around the client"
        limit = aiohttp.ClientTimeout(total=timeout_s)
        try:
            # Behind a full queue our own request would wait for minutes. SGLang counts everything it has sent since,
            # and generates the token only if nothing else is in flight.
            async with self._session.get(f"{self.address.url}/health_generate", timeout=limit) as response:
                # NOT_FOUND: the server does not have this request
                return response.status in (HTTPStatus.OK, HTTPStatus.NOT_FOUND)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            found = connection_error(self.name, "health_generate", error)
            if isinstance(found, OutOfFiles):
                raise found from error
            return False

    async def _ask(self, responses: Sequence["_Response"], sampling: SamplingParameters) -> list[SampledSequence]:
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, MAX_ATTEMPTS + 1):
            # New ids each time: the server may still have the request whose connection broke, and refuses an id that
            # is in use. All have the same length, because SGLang aborts every request whose id starts with the given
            # one.
            sent = [response.request(uuid.uuid4().hex, sampling) for response in responses]
            try:
                return await self._post(self._encoded(responses, sent, sampling), sent)
            except AnswerTimeout:
                raise
            except ServerUnavailable as error:
                if attempt == MAX_ATTEMPTS:
                    raise
                log.warning("%s; attempt %d of %d failed, retrying", error, attempt, MAX_ATTEMPTS)
                await asyncio.sleep(pause_s)
                pause_s *= 2
        raise AssertionError("the last attempt returns or raises")

    def _encoded(
        self, responses: Sequence["_Response"], sent: Sequence[SentRequest], sampling: SamplingParameters
    ) -> bytes:
        # One request with a list of prompts instead of n > 1: only then has each response its own seed.
        shared = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": list(self._facts.stop_token_ids),
            "ignore_eos": False,
            "skip_special_tokens": False,
        }
        return msgspec.json.encode(
            {
                "rid": [request.request_id for request in sent],
                # The prefix cache may be from earlier weights, if publish.flush_cache is off, and with pause mode
                # in_place, which cannot empty it. So a cached prefix serves only requests of the same version; if
                # weights change during requests, only requests of the same group, or of the same key.
                "extra_key": f"version {sent[0].policy_version}"
                if self._exact_versions
                else sampling.cache_key or sent[0].request_id,
                "input_ids": [response.token_ids for response in responses],
                "sampling_params": [
                    {**shared, "max_new_tokens": request.max_tokens, "sampling_seed": response.seed}
                    for response, request in zip(responses, sent, strict=True)
                ],
                "return_logprob": True,
                "return_routed_experts": sampling.with_routes,
                "return_sampling_mask": sampling.with_supports,
            }
        )

    async def _post(self, data: bytes, sent: Sequence[SentRequest]) -> list[SampledSequence]:
        assert self._session is not None, "use `async with` around the client"
        first = sent[0].request_id
        headers = {"Content-Type": "application/json"}
        answered = False
        try:
            url = f"{self.address.url}/generate"
            async with self._session.post(url, data=data, headers=headers) as response, self._room:
                body = await self._body(response, sent)
                answered = True
                self._check_status(response, body, first)
                return await self._check(self._checker, body, sent)
        except aiohttp.ConnectionTimeoutError as error:
            raise ServerUnavailable(self.name, first, "connection", named(error)) from None
        except TimeoutError as error:
            problem = f"no answer within the time limit of server.request_timeout_s = {self._timeout.total:g} s"
            raise AnswerTimeout(self.name, first, "timeout", problem) from error
        except (aiohttp.ClientError, OSError) as error:
            raise connection_error(self.name, first, error) from error
        finally:
            if not answered:  # also if this request was cancelled because its group has moved to another server
                self._abandon(sent)

    async def _body(self, response: aiohttp.ClientResponse, sent: Sequence[SentRequest]) -> bytes:
        body, limit = bytearray(), self._checker.largest_body(sent)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S) as body_limit:
                async for chunk in response.content.iter_any():
                    body += chunk
                    if len(body) > limit:
                        problem = f"more than {limit} bytes, which no answer to {len(sent)} requests has"
                        raise InvalidAnswer(self.name, sent[0].request_id, "body", problem)
        except TimeoutError:
            if not body_limit.expired():
                raise
            problem = f"{len(body)} bytes of the answer in {BODY_TIMEOUT_S:g} s, and not the rest"
            raise AnswerTimeout(self.name, sent[0].request_id, "timeout", problem) from None
        return bytes(body)

    async def _small_body(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_INFO_BYTES:
                raise InvalidAnswer(self.name, "model_info", "body", f"more than {MAX_INFO_BYTES} bytes")
        return bytes(body)

    def _check_status(self, response: aiohttp.ClientResponse, body: bytes, request_id: str) -> None:
        if response.status == HTTPStatus.OK:
            return
        is_refusal = HTTPStatus.BAD_REQUEST <= response.status < HTTPStatus.INTERNAL_SERVER_ERROR
        kind = RequestRefused if is_refusal else ServerUnavailable
        shown = body[:500].decode("utf-8", errors="replace")
        if response.status in WRONG_KEY:
            shown += "; does server.api_key_variable name the key that this server was started with?"
        raise kind(self.name, request_id, "status", f"{response.status} {response.reason}: {shown}")

    def _abandon(self, sent: Sequence[SentRequest]) -> None:
        task = asyncio.create_task(self._abort([request.request_id for request in sent]))
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)

    async def _abort(self, request_ids: Sequence[str]) -> None:
        """Frees the server from requests whose answers are no longer needed; best effort."""
        assert self._session is not None
        limit = aiohttp.ClientTimeout(total=ABORT_TIMEOUT_S)
        url = f"{self.address.url}/abort_request"
        for request_id in request_ids:
            try:
                async with self._session.post(url, json={"rid": request_id}, timeout=limit):
                    pass
            except (aiohttp.ClientError, TimeoutError, OSError):
                return  # the server has ended, and its requests with it


class _Response:
    """The tokens of one response so far, and the request for its remainder."""

    def __init__(self, prompt: list[int], seed: int, max_tokens: int, policy_version: int) -> None:
        self.parts: list[SampledSequence] = []
        self.token_ids = prompt
        self.seed = seed
        self.num_empty_answers = 0
        self._first_seed = seed
        self._left = max_tokens
        self._policy_version = policy_version

    @property
    def is_finished(self) -> bool:
        return bool(self.parts) and self.parts[-1].finish_reason != ABORTED

    def request(self, request_id: str, sampling: SamplingParameters) -> SentRequest:
        return SentRequest(
            request_id,
            len(self.token_ids),
            self._left,
            self._policy_version,
            sampling.with_routes,
            sampling.top_k if sampling.with_supports else 0,
        )

    def add(self, part: SampledSequence) -> None:
        self.parts.append(part)
        num_tokens = len(part.token_ids)
        if not num_tokens:
            self.num_empty_answers += 1
            return
        self.num_empty_answers = 0
        if self.is_finished:
            return  # the rest is for the next request
        self.token_ids = self.token_ids + part.token_ids.tolist()
        self._left -= num_tokens
        self._policy_version = int(part.policy_versions[-1])
        # the same seed could draw the same numbers again
        self.seed = derive_seed(self._first_seed, "continued", len(self.token_ids))
