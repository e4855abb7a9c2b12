"""The data-plane client against a server that answers in SGLang's recorded format, right and wrong."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from minpro_megatron.records import ServerAddress
from minpro_megatron.serving import client as client_module
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters, ServerClient
from minpro_megatron.serving.errors import (
    InvalidAnswer,
    RequestRefused,
    ServerError,
    ServerUnavailable,
    WrongPolicyVersion,
)
from minpro_megatron.serving.model_files import ModelFacts

FACTS = ModelFacts(vocabulary_size=512, stop_token_ids=(258,), max_position_embeddings=64)
SAMPLING = SamplingParameters(temperature=1.0, max_response_tokens=4)
PROMPT = [10, 11, 12]
Answer = dict[str, Any]
Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def answer(request_id: str, tokens: list[int], version: str = "3") -> Answer:
    """One continuation in the form of SGLang 0.5.23."""
    stopped = tokens[-1] == 258
    return {
        "output_ids": tokens,
        "meta_info": {
            "id": request_id,
            "finish_reason": {"type": "stop", "matched": 258} if stopped else {"type": "length", "length": len(tokens)},
            "prompt_tokens": len(PROMPT),
            "weight_version": version,
            "num_retractions": 0,
            "input_token_logprobs": [],
            "output_token_logprobs": [[-0.5 * (place + 1), token, None] for place, token in enumerate(tokens)],
            "output_token_logprobs_length": len(tokens),
            "reasoning_tokens": 0,
            "completion_tokens": len(tokens),
            "cached_tokens": 0,
            "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
            "cached_tokens_details": None,
            "dp_rank": None,
            "e2e_latency": 0.45,
        },
    }


def answers(body: dict[str, Any]) -> list[Answer]:
    """A right answer to a request: a stopped response, then one that reached the limit."""
    return [
        answer(request_id, [7, 8, 258] if place % 2 == 0 else [7, 8, 9, 10])
        for place, request_id in enumerate(body["rid"])
    ]


def generate(handler: Handler, prompt: list[int] = PROMPT, timeout_s: float = 5.0) -> list[SampledSequence]:
    """Two responses to `prompt` from a server with this handler, as version 3."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(request, msgspec.json.decode(await request.read()))

    async def aborted(request: web.Request) -> web.Response:
        return web.Response()

    async def main() -> list[SampledSequence]:
        application = web.Application()
        application.router.add_post("/generate", handle)
        application.router.add_post("/abort_request", aborted)
        async with TestServer(application) as server:
            address = ServerAddress(index=5, url=str(server.make_url("")).rstrip("/"), tensor_parallel=1)
            async with ServerClient(address, FACTS, timeout_s) as client:
                return await client.generate(prompt, [100, 101], SAMPLING, policy_version=3)

    return asyncio.run(main())


def changed(change: Callable[[list[Answer]], Any]) -> Handler:
    """A handler whose right answer is changed in place before it is sent."""

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        made = answers(body)
        change(made)
        return web.json_response(made)

    return handler


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
    assert body["sampling_params"][0] | {"sampling_seed": 0} == {
        "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "stop_token_ids": [258], "ignore_eos": False,
        "skip_special_tokens": False, "sampling_seed": 0,
    }  # fmt: skip
    assert (first.token_ids.tolist(), first.finish_reason) == ([7, 8, 258], "stop")
    assert (second.token_ids.tolist(), second.finish_reason) == ([7, 8, 9, 10], "length")
    assert second.log_probs.tolist() == [-0.5, -1.0, -1.5, -2.0]
    assert second.policy_versions.tolist() == [3, 3, 3, 3]
    kinds = (first.token_ids.dtype.str, first.log_probs.dtype.str, first.policy_versions.dtype.str)
    assert kinds == ("<i4", "<f4", "<i4")


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    def at_the_limit(made: list[Answer]) -> None:
        made[1] = answer(made[1]["meta_info"]["id"], [7, 8, 9, 258])
        made[1]["meta_info"]["finish_reason"] = {"type": "length", "length": 4}

    assert generate(changed(at_the_limit))[1].finish_reason == "stop"


def meta(field: str, value: object) -> Callable[[list[Answer]], None]:
    return lambda made: made[1]["meta_info"].__setitem__(field, value)


def spans(*triples: tuple[str, int, int]) -> Callable[[list[Answer]], None]:
    return meta("weight_versions", [{"version": v, "start": start, "end": end} for v, start, end in triples])


def log_prob(value: object) -> Callable[[list[Answer]], None]:
    return lambda made: made[1]["meta_info"]["output_token_logprobs"][2].__setitem__(0, value)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda made: made.pop(), "body"),
        (lambda made: made[1].pop("output_ids"), "[1]"),
        (lambda made: made[1].__setitem__("output_ids", []), "output_ids"),
        (lambda made: made[1].__setitem__("output_ids", [7, 8, 9]), "meta_info.completion_tokens"),
        (lambda made: made[1].__setitem__("output_ids", [7, 8, 9, 11]), "meta_info.output_token_logprobs"),
        (lambda made: made[1].__setitem__("output_ids", [7, 8, 9, "x"]), "[1].output_ids[3]"),
        (lambda made: made.__setitem__(1, answer(made[1]["meta_info"]["id"], [7, 8, 9, 512])), "output_ids"),
        (lambda made: made.__setitem__(1, answer(made[1]["meta_info"]["id"], [7, -8, 9, 10])), "output_ids"),
        (lambda made: made.__setitem__(1, answer(made[1]["meta_info"]["id"], [7, 258, 9, 10])), "output_ids"),
        (lambda made: made.__setitem__(1, answer(made[1]["meta_info"]["id"], [7] * 5)), "output_ids"),
        (lambda made: made.__setitem__(1, answer(made[1]["meta_info"]["id"], [7] * 3)), "meta_info.finish_reason"),
        (lambda made: made[1]["meta_info"]["output_token_logprobs"].pop(), "meta_info.output_token_logprobs"),
        (log_prob(None), "[1].meta_info.output_token_logprobs[2][0]"),
        (log_prob(0.1), "meta_info.output_token_logprobs"),
        (meta("id", "0" * 32), "meta_info.id"),
        (meta("prompt_tokens", 2), "meta_info.prompt_tokens"),
        (meta("finish_reason", {"type": "abort", "message": "Aborted"}), "meta_info.finish_reason"),
        (meta("finish_reason", {"type": "stop", "matched": 10}), "meta_info.finish_reason"),
        (meta("finish_reason", None), "[1].meta_info.finish_reason"),
        (spans(("default", 0, 4)), "meta_info.weight_versions"),
        (spans(("3", 0, 3)), "meta_info.weight_versions"),
        (spans(("3", 0, 5)), "meta_info.weight_versions"),
        (spans(("3", 0, 2), ("3", 3, 4)), "meta_info.weight_versions"),
        (spans(("3", 0, 3), ("3", 2, 4)), "meta_info.weight_versions"),
        (spans(), "meta_info.weight_versions"),
    ],
)
def test_a_damaged_answer_names_server_request_and_field(change: Callable[[list[Answer]], Any], field: str) -> None:
    with pytest.raises(InvalidAnswer) as caught:
        generate(changed(change))
    assert caught.value.field == field
    assert caught.value.server.startswith("server 5 at http://127.0.0.1:")
    assert len(caught.value.request_id) == 32
    assert str(caught.value).startswith(f"{caught.value.server}, request {caught.value.request_id}, {field}: ")


def test_an_aborted_request_without_the_usual_fields_is_called_aborted() -> None:
    def aborted_in_queue(made: list[Answer]) -> None:
        reason = {"type": "abort", "message": "Abort in waiting queue"}
        made[0] = {"output_ids": [], "meta_info": {"id": made[0]["meta_info"]["id"], "finish_reason": reason}}

    with pytest.raises(InvalidAnswer, match="'abort' is neither stop nor length"):
        generate(changed(aborted_in_queue))


@pytest.mark.parametrize("change", [spans(("2", 0, 4)), spans(("3", 0, 3), ("4", 3, 4))])
def test_tokens_of_another_version_are_refused(change: Callable[[list[Answer]], None]) -> None:
    with pytest.raises(WrongPolicyVersion, match="instead of 3"):
        generate(changed(change))


@pytest.mark.parametrize("text", ['[{"output_ids": [1', "<html>busy</html>", "", "[NaN, NaN]", "{}"])
def test_garbage_is_no_answer(text: str) -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(text=text)

    with pytest.raises(InvalidAnswer):
        generate(handler)


def test_nan_log_probs_are_refused() -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        made = answers(body)
        log_prob(float("nan"))(made)  # json writes NaN, which is no JSON
        return web.json_response(made)

    with pytest.raises(InvalidAnswer):
        generate(handler)


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
