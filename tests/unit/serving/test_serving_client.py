"""The data-plane client against a server that answers in SGLang's recorded format, right and wrong."""

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from minpro_megatron.records import ServerAddress
from minpro_megatron.serving import client as client_module
from minpro_megatron.serving.answers import AnswerChecker, SampledSequence, SentRequest
from minpro_megatron.serving.client import ServerClient
from minpro_megatron.serving.errors import (
    AnswerTimeout,
    InvalidAnswer,
    RequestRefused,
    ServerError,
    ServerUnavailable,
)
from tests.support.fake_engine import FakeEngine
from tests.support.sglang_answers import FACTS, PROMPT, SAMPLING, answers, changed, generate


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.001)


def test_a_group_is_one_request_with_a_seed_and_an_id_for_each_response() -> None:
    seen: list[dict[str, Any]] = []

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        seen.append(body)
        return web.json_response(answers(body))

    first, second = generate(handler)
    (body,) = seen
    assert body["input_ids"] == [PROMPT, PROMPT]
    assert [parameters["sampling_seed"] for parameters in body["sampling_params"]] == [100, 101]
    assert len(set(body["rid"])) == 2
    assert {len(request_id) for request_id in body["rid"]} == {32}
    assert body["return_logprob"] is True
    assert body["return_sampling_mask"] is False
    assert body["extra_key"] == "version 3"  # what the server has cached of other weights is of no use
    assert body["sampling_params"][0] | {"sampling_seed": 0} == {
        "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "top_k": -1, "stop_token_ids": [258],
        "ignore_eos": False, "skip_special_tokens": False, "sampling_seed": 0,
    }  # fmt: skip
    assert (first.token_ids.tolist(), first.finish_reason) == ([7, 8, 258], "stop")
    assert (second.token_ids.tolist(), second.finish_reason) == ([7, 8, 9, 10], "length")
    assert second.log_probs.tolist() == [-0.5, -1.0, -1.5, -2.0]
    assert second.policy_versions.tolist() == [3, 3, 3, 3]
    kinds = (first.token_ids.dtype.str, first.log_probs.dtype.str, first.policy_versions.dtype.str)
    assert kinds == ("<i4", "<f4", "<i4")


def test_where_weights_change_under_requests_no_cached_prefix_serves_another_group() -> None:
    keys: list[str] = []

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        keys.append(body["extra_key"])
        return web.json_response(answers(body))

    for _ in range(2):
        generate(handler, exact_versions=False)
    assert len(set(keys)) == 2


class Flaky:
    """Fails `failures` times in a given way, then answers."""

    def __init__(self, how: str, failures: int) -> None:
        self.how, self.failures = how, failures
        self.request_ids: list[str] = []

    async def __call__(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        self.request_ids += body["rid"]
        if len(self.request_ids) > 2 * self.failures:
            return web.json_response(answers(body))
        if self.how == "500":
            return web.Response(status=500, text="scheduler is busy")
        assert request.transport is not None
        if self.how == "dropped":
            request.transport.abort()
            return web.Response()
        response = web.StreamResponse(headers={"Content-Length": "1000"})  # cut: the connection ends before its body
        await response.prepare(request)
        await response.write(b"[")
        request.transport.abort()
        return response


@pytest.mark.parametrize("how", ["500", "dropped", "cut"])
def test_passing_failures_are_tried_again_with_fresh_request_ids(how: str) -> None:
    flaky = Flaky(how, failures=2)
    assert len(generate(flaky)) == 2
    assert len(flaky.request_ids) == len(set(flaky.request_ids)) == 6


@pytest.mark.parametrize("how", ["500", "dropped", "cut"])
def test_lasting_failures_end(how: str) -> None:
    flaky = Flaky(how, failures=100)
    with pytest.raises(ServerUnavailable, match="server 5"):
        generate(flaky)
    assert len(flaky.request_ids) == 2 * client_module.MAX_ATTEMPTS


def test_the_key_goes_with_every_request_and_a_wrong_one_is_named() -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        if request.headers.get("Authorization") != "Bearer right":
            return web.json_response({"error": "Unauthorized"}, status=401)
        return web.json_response(answers(body))

    assert len(generate(handler, headers={"Authorization": "Bearer right"})) == 2
    with pytest.raises(RequestRefused, match=r"401 Unauthorized.*server\.api_key_variable"):
        generate(handler, headers={"Authorization": "Bearer wrong"})


def test_what_nobody_waits_for_any_more_is_aborted() -> None:
    seen: list[str] = []
    aborted: list[str] = []

    async def hang(request: web.Request, body: dict[str, Any]) -> web.Response:
        seen.extend(body["rid"])
        await asyncio.sleep(10)
        return web.Response()

    with pytest.raises(AnswerTimeout):
        generate(hang, timeout_s=0.05, aborted_ids=aborted)
    assert len(aborted) == 2
    assert seen in (aborted, [])  # a slow server has not seen the request by then
    dropped = Flaky("dropped", failures=1)
    aborted.clear()
    generate(dropped, aborted_ids=aborted)
    assert aborted == dropped.request_ids[:2]


def test_a_trickling_answer_meets_its_own_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "BODY_TIMEOUT_S", 0.05)

    async def drip(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        while True:
            await response.write(b"[")
            await asyncio.sleep(0.01)

    with pytest.raises(AnswerTimeout, match=r"bytes of the answer in 0.05 s, and not the rest"):
        generate(drip)


def test_an_endless_answer_is_cut_off() -> None:
    async def endless(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" " * 65536)

    with pytest.raises(InvalidAnswer, match="which no answer to 2 requests has"):
        generate(endless)


def test_the_given_function_calls_the_checker() -> None:
    bodies: list[int] = []

    async def noted(checker: AnswerChecker, body: bytes, requests: Sequence[SentRequest]) -> list[SampledSequence]:
        bodies.append(len(body))
        return checker.check(body, requests)

    sequences = generate(changed(lambda made: None), check=noted)
    assert [len(sequence.token_ids) for sequence in sequences] == [3, 4]
    assert len(bodies) == 1


def test_a_finished_response_is_not_copied_into_a_request() -> None:
    response = client_module._Response([1, 2], seed=7, max_tokens=9, policy_version=3)
    part = SampledSequence(np.array([5], np.int32), np.zeros(1, np.float32), np.full(1, 3, np.int32), "abort")
    response.add(part)
    assert response.token_ids == [1, 2, 5]
    response.add(dataclasses.replace(part, finish_reason="stop"))
    assert response.is_finished
    assert response.token_ids == [1, 2, 5]


def test_few_answers_of_a_server_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    read_body, reading, most = ServerClient._body, 0, 0

    async def counted(self: ServerClient, *arguments: Any) -> bytes:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        while most < client_module.MAX_ANSWERS_AT_ONCE:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)  # the others have their headers by now
        body = await read_body(self, *arguments)
        reading -= 1
        return body

    async def main() -> None:
        async with FakeEngine(version="3") as engine:
            address = ServerAddress(index=0, url=engine.url, tensor_parallel=1)
            async with ServerClient(address, FACTS, 5.0) as client:
                groups = [client.generate(PROMPT, [1, 2], SAMPLING, policy_version=3) for _ in range(5)]
                assert [len(sequences) for sequences in await asyncio.gather(*groups)] == [2] * 5

    monkeypatch.setattr(ServerClient, "_body", counted)
    asyncio.run(main())
    assert most == client_module.MAX_ANSWERS_AT_ONCE


def test_a_refused_request_is_not_repeated() -> None:
    calls: list[int] = []

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        calls.append(1)
        return web.json_response({"error": {"message": "too long"}}, status=400)

    with pytest.raises(RequestRefused, match=r"400 Bad Request.*too long"):
        generate(handler)
    assert len(calls) == 1


def test_a_silent_server_meets_the_time_limit_once() -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(10)
        return web.Response()

    with pytest.raises(ServerUnavailable, match=r"server.request_timeout_s = 0.05 s"):
        generate(handler, timeout_s=0.05)


@pytest.mark.parametrize("prompt", [[], [512], [3, -1]])
def test_a_prompt_that_would_end_the_server_is_never_sent(prompt: list[int]) -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        raise AssertionError("sent")

    with pytest.raises(ValueError, match="vocabulary of 512"):
        generate(handler, prompt=prompt)


def test_nobody_listening_is_unavailable() -> None:
    async def main() -> None:
        address = ServerAddress(index=0, url="http://127.0.0.1:9", tensor_parallel=1)
        async with ServerClient(address, FACTS, 5.0) as client:
            with pytest.raises(ServerError, match=r"server 0 at http://127.0.0.1:9"):
                await client.generate(PROMPT, [1], SAMPLING, 0)
            with pytest.raises(ServerUnavailable):
                await client.policy_version()

    asyncio.run(main())
