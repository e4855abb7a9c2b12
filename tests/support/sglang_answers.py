"""Answers in the form of SGLang 0.5.23, and a client's requests to a server that gives them."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.test_utils import TestServer

from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.answers import SampledSequence
from minpro_megatron.serving.client import SamplingParameters, ServerClient

FACTS = ModelFacts(vocabulary_size=512, stop_token_ids=(258,), max_position_embeddings=64)
SAMPLING = SamplingParameters(temperature=1.0, max_response_tokens=4)
PROMPT = [10, 11, 12]
Answer = dict[str, Any]
Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def answer(request_id: str, tokens: list[int], version: str = "3", num_prompt_tokens: int = len(PROMPT)) -> Answer:
    """One continuation in the form of SGLang 0.5.23."""
    stopped = tokens[-1] == 258
    return {
        "output_ids": tokens,
        "meta_info": {
            "id": request_id,
            "finish_reason": {"type": "stop", "matched": 258} if stopped else {"type": "length", "length": len(tokens)},
            "prompt_tokens": num_prompt_tokens,
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


def generate(
    handler: Handler,
    prompt: list[int] = PROMPT,
    timeout_s: float = 5.0,
    facts: ModelFacts = FACTS,
    aborted_ids: list[str] | None = None,
    with_routes: bool = False,
    top_k: int = 0,
    **options: Any,
) -> list[SampledSequence]:
    """Two responses to `prompt` from a server with this handler, as version 3; `options` are the client's."""
    sampling = dataclasses.replace(SAMPLING, with_routes=with_routes, top_k=top_k, with_supports=top_k > 0)

    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(request, msgspec.json.decode(await request.read()))

    async def aborted(request: web.Request) -> web.Response:
        if aborted_ids is not None:
            aborted_ids.append((await request.json())["rid"])
        return web.Response()

    async def main() -> list[SampledSequence]:
        application = web.Application()
        application.router.add_post("/generate", handle)
        application.router.add_post("/abort_request", aborted)
        async with TestServer(application) as server:
            address = ServerAddress(index=5, url=str(server.make_url("")).rstrip("/"), tensor_parallel=1)
            async with ServerClient(address, facts, timeout_s, **options) as client:
                return await client.generate(prompt, [100, 101], sampling, policy_version=3)

    return asyncio.run(main())


def changed(change: Callable[[list[Answer]], Any]) -> Handler:
    """A handler whose right answer is changed in place before it is sent."""

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        made = answers(body)
        change(made)
        return web.json_response(made)

    return handler


def meta(field: str, value: object) -> Callable[[list[Answer]], None]:
    return lambda made: made[1]["meta_info"].__setitem__(field, value)


def spans(*triples: tuple[str, int, int]) -> Callable[[list[Answer]], None]:
    return meta("weight_versions", [{"version": v, "start": start, "end": end} for v, start, end in triples])


def log_prob(value: object) -> Callable[[list[Answer]], None]:
    return lambda made: made[1]["meta_info"]["output_token_logprobs"][2].__setitem__(0, value)
