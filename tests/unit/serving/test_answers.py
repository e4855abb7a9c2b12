"""Every field of an answer is checked; what the server gives back unfinished is continued, with versions and routes."""

import base64
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from aiohttp import web

from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.serving.errors import InvalidAnswer, ServerUnavailable, WrongPolicyVersion
from tests.support.sglang_answers import PROMPT, Answer, answer, answers, changed, generate, log_prob, meta, spans


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    def at_the_limit(made: list[Answer]) -> None:
        made[1] = answer(made[1]["meta_info"]["id"], [7, 8, 9, 258])
        made[1]["meta_info"]["finish_reason"] = {"type": "length", "length": 4}

    assert generate(changed(at_the_limit))[1].finish_reason == "stop"


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
        (log_prob(-1e300), "meta_info.output_token_logprobs"),  # -inf as float32
        (meta("id", "0" * 32), "meta_info.id"),
        (meta("prompt_tokens", 2), "meta_info.prompt_tokens"),
        (meta("finish_reason", {"type": "error"}), "meta_info.finish_reason"),
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


@pytest.mark.parametrize("change", [spans(("2", 0, 4)), spans(("3", 0, 3), ("4", 3, 4))])
def test_tokens_of_another_version_are_refused(change: Callable[[list[Answer]], None]) -> None:
    with pytest.raises(WrongPolicyVersion, match="instead of 3"):
        generate(changed(change))


@pytest.mark.parametrize(
    "sent",
    [
        b'[{"output_ids": [1',
        b"<html>busy</html>",
        b"",
        b"[NaN, NaN]",
        b"{}",
        b"[" * 20000,
        b'[{"new": ' + b"[" * 20000 + b"]" * 20000 + b"}, {}]",
        b'[{"output_ids": [1], "meta_info": {"id": "\xff"}}, {}]',
    ],
)
def test_garbage_is_no_answer(sent: bytes) -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(body=sent)

    with pytest.raises(InvalidAnswer):
        generate(handler)


def test_nan_log_probs_are_refused() -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        made = answers(body)
        log_prob(float("nan"))(made)  # json writes NaN, which is no JSON
        return web.json_response(made)

    with pytest.raises(InvalidAnswer):
        generate(handler)


class Aborting:
    """Gives both responses back after one token, then the second once more from the queue, then ends them.

    Each request is sampled with one version more than the one before.
    """

    def __init__(self, first_version: int = 3, step: int = 1) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.version, self.step = first_version, step

    async def __call__(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        self.bodies.append(body)
        version = str(self.version)
        self.version += self.step
        made = []
        for place, (request_id, prompt) in enumerate(zip(body["rid"], body["input_ids"], strict=True)):
            made.append(answer(request_id, [7], version, len(prompt)))
            if len(self.bodies) > 2 or (len(self.bodies) == 2 and place == 0):
                made[-1] = answer(request_id, [8, 258], version, len(prompt))
            elif len(self.bodies) == 1:
                made[-1]["meta_info"]["finish_reason"] = {"type": "abort", "message": "Aborted", "status_code": None}
            else:  # as SGLang answers what was still waiting: there is no prompt_tokens
                reason = {"type": "abort", "message": "Abort in waiting queue"}
                spans = [{"version": version, "start": 0, "end": 0}]
                meta = {"id": request_id, "finish_reason": reason, "weight_versions": spans, "completion_tokens": 0}
                made[-1] = {"output_ids": [], "meta_info": meta}
        return web.json_response(made)


def test_what_the_server_gives_back_is_continued() -> None:
    aborting = Aborting()
    first, second = generate(aborting, exact_versions=False)
    assert [sequence.token_ids.tolist() for sequence in (first, second)] == [[7, 8, 258]] * 2
    assert [sequence.log_probs.tolist() for sequence in (first, second)] == [[-0.5, -0.5, -1.0]] * 2
    assert (first.policy_versions.tolist(), second.policy_versions.tolist()) == ([3, 4, 4], [3, 5, 5])
    assert (first.finish_reason, second.finish_reason) == ("stop", "stop")
    assert [body["input_ids"] for body in aborting.bodies] == [
        [PROMPT, PROMPT], [[*PROMPT, 7], [*PROMPT, 7]], [[*PROMPT, 7]]
    ]  # fmt: skip
    limits = [[parameters["max_new_tokens"] for parameters in body["sampling_params"]] for body in aborting.bodies]
    assert limits == [[4, 4], [3, 3], [3]]
    seeds = [parameters["sampling_seed"] for body in aborting.bodies[:2] for parameters in body["sampling_params"]]
    assert len(set(seeds)) == 4  # the same seed could draw the same numbers for other tokens
    ids = [request_id for body in aborting.bodies for request_id in body["rid"]]
    assert len(set(ids)) == len(ids)


def test_a_continued_response_must_keep_its_version_or_rise() -> None:
    with pytest.raises(WrongPolicyVersion, match=r"version \[4\] instead of 3"):
        generate(Aborting(), exact_versions=True)
    with pytest.raises(WrongPolicyVersion, match=r"versions \[3\], which must rise from 4"):
        generate(Aborting(first_version=4, step=-1), exact_versions=False)
    assert generate(Aborting(step=0), exact_versions=True)[0].policy_versions.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("change", "is_valid"),
    [
        (spans(("3", 0, 1), ("4", 1, 3), ("7", 3, 4)), True),
        (spans(("5", 0, 4)), True),
        (spans(("2", 0, 1), ("3", 1, 4)), False),
        (spans(("4", 0, 1), ("3", 1, 4)), False),
    ],
)
def test_versions_may_rise_within_a_response_where_that_is_allowed(
    change: Callable[[list[Answer]], None], is_valid: bool
) -> None:
    if is_valid:
        assert generate(changed(change), exact_versions=False)[1].policy_versions[0] >= 3
    else:
        with pytest.raises(WrongPolicyVersion, match="must rise from 3"):
            generate(changed(change), exact_versions=False)


def test_a_server_that_only_aborts_is_unavailable() -> None:
    def from_the_queue(made: list[Answer]) -> None:
        for one in made:
            one["output_ids"] = []
            one["meta_info"]["finish_reason"] = {"type": "abort"}

    with pytest.raises(ServerUnavailable, match="aborted 21 times in a row without a token"):
        generate(changed(from_the_queue))


MOE = ModelFacts(512, (258,), 64, num_layers=2, num_experts=8, experts_per_token=2)


def with_routes(body: dict[str, Any], made: list[Answer], first: int = 0) -> list[Answer]:
    """Adds routes: row r, layer l, choice c has expert (first + r + 2 l + c) % 8."""
    for prompt, one in zip(body["input_ids"], made, strict=True):
        rows = np.arange(len(prompt) + len(one["output_ids"]) - 1)[:, None, None]
        routes = (first + rows + 2 * np.arange(2)[:, None] + np.arange(2)) % 8
        one["meta_info"]["routed_experts"] = base64.b64encode(routes.astype("<i4").tobytes()).decode()
    return made


def expected_routes(num_rows: int, first: int = 0) -> np.ndarray:
    return (first + np.arange(num_rows)[:, None, None] + 2 * np.arange(2)[:, None] + np.arange(2)) % 8


def test_routes_come_as_small_integers() -> None:
    seen: list[dict[str, Any]] = []

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        seen.append(body)
        return web.json_response(with_routes(body, answers(body)))

    first, second = generate(handler, facts=MOE, with_routes=True)
    assert seen[0]["return_routed_experts"] is True
    assert first.routed_experts is not None
    assert second.routed_experts is not None
    assert first.routed_experts.dtype == np.uint8
    assert np.array_equal(first.routed_experts, expected_routes(len(PROMPT) + 3 - 1))
    assert np.array_equal(second.routed_experts, expected_routes(len(PROMPT) + 4 - 1))
    many = ModelFacts(512, (258,), 64, num_layers=2, num_experts=300, experts_per_token=2)
    assert generate(handler, facts=many, with_routes=True)[0].routed_experts.dtype == np.int16  # type: ignore[union-attr]
    assert generate(handler, facts=MOE)[0].routed_experts is None
    assert seen[-1]["return_routed_experts"] is False


def test_a_continued_response_keeps_the_routes_of_the_request_that_sampled_each_token() -> None:
    aborting = Aborting()

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        plain = await aborting(request, body)
        assert plain.body is not None
        made = msgspec.json.decode(plain.body, type=list[dict[str, Any]])  # type: ignore[arg-type]
        return web.json_response(with_routes(body, made, first=3 * len(aborting.bodies)))

    first, second = generate(handler, facts=MOE, with_routes=True, exact_versions=False)
    for sequence, last_request in ((first, 2), (second, 3)):
        assert sequence.routed_experts is not None
        assert len(sequence.routed_experts) == len(PROMPT) + len(sequence.token_ids) - 1
        # request 1 processed the prompt; the token it sampled, and what follows, the last request
        assert np.array_equal(sequence.routed_experts[:3], expected_routes(3, first=3))
        assert np.array_equal(sequence.routed_experts[3:], expected_routes(5, first=3 * last_request)[3:])


@pytest.mark.parametrize(
    ("num_retractions", "new_from", "num_requests"),
    [
        (1, 2, 2),  # the routes of tokens 0 and 1 are those of version 4
        (1, 0, 1),  # retracted before and after: all of version 4
        (0, 2, 1),
    ],
)
def test_a_response_is_sampled_again_if_other_weights_have_computed_its_routes(
    num_retractions: int, new_from: int, num_requests: int
) -> None:
    asked: list[int] = []

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        asked.append(len(body["rid"]))
        made = with_routes(body, answers(body))
        if len(asked) == 1:
            meta = made[0]["meta_info"]
            meta["num_retractions"] = num_retractions
            spans = [{"version": "3", "start": 0, "end": new_from}] if new_from else []
            meta["weight_versions"] = [*spans, {"version": "4", "start": new_from, "end": 3}]
        return web.json_response(made)

    first, second = generate(handler, facts=MOE, with_routes=True, exact_versions=False)
    assert asked == [2, 1][:num_requests]
    assert len(first.token_ids) == 3
    assert len(second.token_ids) == 4
    for sequence in (first, second):
        assert sequence.routed_experts is not None
        assert len(sequence.routed_experts) == len(PROMPT) + len(sequence.token_ids) - 1


def route_bytes(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Answer], None]:
    def apply(one: Answer) -> None:
        routes = np.frombuffer(base64.b64decode(one["meta_info"]["routed_experts"]), "<i4").copy()
        one["meta_info"]["routed_experts"] = base64.b64encode(change(routes).tobytes()).decode()

    return apply


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda one: one["meta_info"].pop("routed_experts"), "missing; start the server with"),
        (route_bytes(lambda routes: routes[:-4]), r"80 bytes instead of 96 for int32 of shape \(6, 2, 2\)"),
        (route_bytes(lambda routes: routes.astype("<i8")), "192 bytes instead of 96"),
        (route_bytes(lambda routes: routes + 1), "an expert outside the model's 8"),
        (route_bytes(lambda routes: routes - 1), "an expert outside the model's 8"),
        (lambda one: one["meta_info"].__setitem__("routed_experts", "no base64!"), "base64"),
    ],
)
def test_damaged_routes_are_refused(change: Callable[[Answer], None], problem: str) -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        made = with_routes(body, answers(body))
        change(made[1])
        return web.json_response(made)

    with pytest.raises(InvalidAnswer, match=problem) as caught:
        generate(handler, facts=MOE, with_routes=True)
    assert caught.value.kind == "routed_experts"


TOP_K = 3


def with_kept_ids(made: list[Answer]) -> list[Answer]:
    """Adds the kept ids: each token's own, and in turn one or two more."""
    for one in made:
        ids = one["output_ids"]
        kept = [[300 + place, token] if place % 2 else [token, 1, 400] for place, token in enumerate(ids)]
        one["meta_info"]["output_token_sampling_mask"] = kept
        one["meta_info"]["output_token_sampling_logprobs"] = [-0.25 * (place + 1) for place in range(len(ids))]
    return made


def test_kept_ids_come_as_one_array_with_the_log_probs_among_them() -> None:
    seen: list[dict[str, Any]] = []

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        seen.append(body)
        return web.json_response(with_kept_ids(answers(body)))

    first, second = generate(handler, top_k=TOP_K)
    assert seen[0]["return_sampling_mask"] is True
    assert [parameters["top_k"] for parameters in seen[0]["sampling_params"]] == [TOP_K] * 2
    assert first.supports is not None
    assert first.supports.dtype == np.int32
    assert first.supports.tolist() == [3, 2, 3, 7, 1, 400, 301, 8, 258, 1, 400]
    assert first.log_probs.tolist() == [-0.25, -0.5, -0.75]  # and not those of the whole softmax
    assert second.log_probs.tolist() == [-0.25, -0.5, -0.75, -1.0]
    plain = generate(handler)[0]
    assert (plain.supports, plain.log_probs.tolist()) == (None, [-0.5, -1.0, -1.5])


def test_a_continued_response_has_the_kept_ids_of_all_its_parts() -> None:
    aborting = Aborting()

    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        plain = await aborting(request, body)
        assert plain.body is not None
        made = msgspec.json.decode(plain.body, type=list[dict[str, Any]])  # type: ignore[arg-type]
        return web.json_response(with_kept_ids(made))

    for sequence in generate(handler, top_k=TOP_K, exact_versions=False):
        assert sequence.supports is not None
        sizes, ids = np.split(sequence.supports, [len(sequence.token_ids)])
        assert sizes.sum() == len(ids)
        of_tokens = np.split(ids, np.cumsum(sizes)[:-1])
        assert all(token in own for token, own in zip(sequence.token_ids, of_tokens, strict=True))


def kept(change: Callable[[Any], object]) -> Callable[[Answer], object]:
    return lambda one: change(one["meta_info"]["output_token_sampling_mask"])


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        (lambda one: one["meta_info"].pop("output_token_sampling_mask"), "mask", "missing; connect to the server"),
        (kept(lambda ids: ids.pop()), "mask", "kept ids of 3 tokens for 4 output_ids"),
        (kept(lambda ids: ids[1].clear()), "mask", "a sampled token is not among its kept ids"),
        (kept(lambda ids: ids[1].remove(8)), "mask", "a sampled token is not among its kept ids"),
        (kept(lambda ids: ids[0].append(400)), "mask", "a kept id is there twice"),
        (kept(lambda ids: ids[2].append(512)), "mask", "a kept id outside the vocabulary of 512"),
        (kept(lambda ids: ids[2].append(-1)), "mask", "a kept id outside the vocabulary of 512"),
        (kept(lambda ids: ids[2].extend(range(100, 200))), "mask", "103 kept ids of a token exceed 76"),
        (kept(lambda ids: ids.__setitem__(0, [7.5])), "mask", "Expected `int`"),
        (lambda one: one["meta_info"]["output_token_sampling_logprobs"].pop(), "logprobs", "3 entries for 4"),
        (
            lambda one: one["meta_info"]["output_token_sampling_logprobs"].__setitem__(1, 0.5),
            "logprobs",
            r"\[0.5\] are not log-probs",
        ),
    ],
)
def test_damaged_kept_ids_are_refused(change: Callable[[Answer], object], field: str, problem: str) -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.Response:
        made = with_kept_ids(answers(body))
        change(made[1])
        return web.json_response(made)

    with pytest.raises(InvalidAnswer, match=problem) as caught:
        generate(handler, top_k=TOP_K)
    assert caught.value.kind == f"output_token_sampling_{field}"
