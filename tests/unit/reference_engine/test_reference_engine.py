"""The reference engine: the same bits alone and under load; pauses, updates and aborts between any two tokens."""

from base64 import b64decode
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from minpro_megatron.reference_engine.engine import MAX_PREFIXES, CacheInUse, Engine
from minpro_megatron.reference_engine.model import KeyValueCache, Model
from minpro_megatron.reference_engine.responses import Response
from minpro_megatron.reference_engine.sampling import SamplingParameters
from tests.support.reference_models import (
    architecture,
    computed,
    random_model,
    random_tensors,
    response,
    sampled,
    spans,
)

WAIT_S = 20
LONG = 60


@pytest.fixture
def engine() -> Engine:
    return started(max_running=64)


def started(max_running: int) -> Engine:
    engine = Engine(random_model(0), "0", max_running)
    engine.start()
    return engine


def run(engine: Engine, function: Callable[[], object]) -> object:
    return engine.call(function).result(WAIT_S)


def add(engine: Engine, *responses: Response) -> None:
    run(engine, lambda: engine.add(list(responses)))


def at_token(one: Response, num_tokens: int, function: Callable[[], object]) -> None:
    """Calls `function` right after that many tokens of the response, and before any other token of any response."""
    sample = one.sample

    def sampling(logits_V: torch.Tensor, version: str) -> dict | None:
        reason = sample(logits_V, version)
        if len(one.tokens) - one.num_prompt_tokens == num_tokens:
            function()
        return reason

    one.sample = sampling


def pause_at(engine: Engine, one: Response, num_tokens: int, mode: str) -> Future[None]:
    """Pauses the engine when the response has that many tokens. The future ends when it has."""
    paused: Future[None] = Future()
    at_token(one, num_tokens, lambda: engine.call(lambda: paused.set_result(engine.pause(mode))))
    return paused


def test_a_response_is_the_same_alone_and_under_load():
    model = random_model(0)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    wanted = {
        (place, seed): computed(prompt, seed, 12, [model]) for place, prompt in enumerate(prompts) for seed in (1, 2)
    }
    assert len({tuple(tokens) for tokens, _ in wanted.values()}) == len(wanted)
    for max_running in (1, 3, 64):
        engine = started(max_running)
        responses = {
            (place, seed): response(prompts[place], seed, 12 if seed < 3 else 30)
            for seed in (3, 1, 2)
            for place in range(3)
        }
        add(engine, *responses.values())
        for key, expected in wanted.items():
            assert sampled(responses[key].answer.result(WAIT_S)) == expected
        add(engine, longer := response(prompts[0], 1, 20, "longer"))
        tokens, log_probs = sampled(
            longer.answer.result(WAIT_S)
        )  # another capacity of the cache, a prompt known before
        assert (tokens[:12], log_probs[:12]) == wanted[0, 1]


def test_more_prompts_than_are_kept():
    engine = started(max_running=2 * MAX_PREFIXES)
    prompts = [[a, b, 3] for a in range(10) for b in range(8)]
    assert len(prompts) > MAX_PREFIXES
    responses = [response(prompt, 1, 3) for prompt in prompts]
    add(engine, *responses)
    model = random_model(0)
    for prompt, one in list(zip(prompts, responses, strict=True))[::16]:
        assert sampled(one.answer.result(WAIT_S)) == computed(prompt, 1, 3, [model])
    assert run(engine, lambda: len(engine._prefixes)) == MAX_PREFIXES


def test_it_ends_at_a_stop_token_or_at_the_limit(engine: Engine):
    tokens, _ = computed([1, 2], 3, 20, [random_model(0)])
    place = next(i for i in range(2, 15) if tokens[i] not in tokens[:i])

    def finished(max_new_tokens: int, **parameters: object) -> tuple[list[int], dict]:
        sampling = SamplingParameters(max_new_tokens=max_new_tokens, sampling_seed=3, **parameters)  # type: ignore[arg-type]
        one = Response("a", [1, 2], sampling, frozenset(model_stops))
        add(engine, one)
        answer = one.answer.result(WAIT_S)
        return answer["output_ids"], answer["meta_info"]["finish_reason"]

    model_stops: set[int] = {tokens[place]}
    stopped = (tokens[: place + 1], {"type": "stop", "matched": tokens[place]})
    assert finished(20) == stopped
    assert finished(20, ignore_eos=True) == (tokens, {"type": "length", "length": 20})
    assert finished(place + 1) == (tokens[: place + 1], {"type": "length", "length": place + 1})
    model_stops = set()
    assert finished(20, stop_token_ids=[tokens[place]]) == stopped


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_weights_change_between_two_tokens(engine: Engine, mode: str):
    one, other = response([1, 2, 3], 5, LONG), response([1, 2, 3], 6, LONG)
    paused = pause_at(engine, one, 20, mode)
    add(engine, one, other)
    paused.result(WAIT_S)
    during = response([1, 2, 3], 7, 3)
    add(engine, during)
    if mode == "in_place":
        with pytest.raises(CacheInUse):
            run(engine, engine.flush_cache)
    else:
        run(engine, engine.flush_cache)
    engine.update(lambda: engine.load_weights(random_tensors(1), "1")).result(WAIT_S)
    assert len(one.tokens) == 3 + 20  # paused
    assert not during.answer.done()
    run(engine, engine.resume)
    models = [random_model(0), random_model(1)]
    for asked, seed in ((one, 5), (other, 6)):
        answer = asked.answer.result(WAIT_S)
        (_, _, change), *_ = found = spans(answer)
        assert found == [("0", 0, change), ("1", change, LONG)]
        assert change == (20 if asked is one else 19)  # they take turns
        assert sampled(answer) == computed([1, 2, 3], seed, LONG, models, change, retract=mode == "retract")
        assert answer["meta_info"]["weight_version"] == "1"
        assert answer["meta_info"]["num_retractions"] == int(mode == "retract")
    answer = during.answer.result(WAIT_S)
    assert spans(answer) == [("1", 0, 3)]
    assert sampled(answer) == computed([1, 2, 3], 7, 3, [models[1]])  # no keys of the old weights


def test_a_retraction_alone_changes_no_bit(engine: Engine):
    one = response([1, 2, 3], 5, LONG, routes_from=0)
    paused = pause_at(engine, one, 20, "retract")
    add(engine, one)
    paused.result(WAIT_S)
    run(engine, engine.resume)
    answer = one.answer.result(WAIT_S)
    assert sampled(answer) == computed([1, 2, 3], 5, LONG, [random_model(0)])
    assert len(b64decode(answer["meta_info"]["routed_experts"])) == 4 * (3 + LONG - 1) * 2 * 2


def test_an_update_waits_for_what_is_under_way(engine: Engine):
    first, second = response([1, 2], 5, LONG), response([1, 2], 6, 5)
    updated: Future[Future[None]] = Future()

    def update() -> None:
        updated.set_result(engine.update(lambda: engine.load_weights(random_tensors(1), "1")))
        engine.call(lambda: engine.add([second]))

    at_token(first, 10, update)
    add(engine, first)
    updated.result(WAIT_S).result(WAIT_S)
    assert first.answer.done()
    models = [random_model(0), random_model(1)]
    assert sampled(first.answer.result(WAIT_S)) == computed([1, 2], 5, LONG, [models[0]])
    assert sampled(second.answer.result(WAIT_S)) == computed([1, 2], 6, 5, [models[1]])


def test_updates_do_not_block_responses_that_wait_for_a_turn():
    engine = started(max_running=1)
    responses = [response([1], seed, 40) for seed in range(4)]
    add(engine, *responses)
    engine.update(lambda: engine.load_weights(random_tensors(1), "1")).result(WAIT_S)
    assert [spans(one.answer.result(WAIT_S)) for one in responses] == [[("0", 0, 40)]] * 4


def test_a_wrong_shape_changes_nothing(engine: Engine):
    before = engine.model.checksums()
    tensors = [*random_tensors(1)[:3], ("model.norm.weight", torch.zeros(17))]
    with pytest.raises(ValueError, match=r"model.norm.weight: shape \(17,\) does not match the model's \(16,\)"):
        engine.update(lambda: engine.load_weights(tensors, "1")).result(WAIT_S)
    assert (engine.model.checksums(), engine.weight_version) == (before, "0")
    engine.update(lambda: engine.load_weights([("model.unknown", torch.zeros(1))], "1")).result(WAIT_S)
    assert (engine.model.checksums(), engine.weight_version) == (before, "1")


def test_an_abort_gives_back_what_there_is(engine: Engine):
    begun, alike, other = (response([1, 2], seed, LONG, name) for seed, name in enumerate(["ab", "abc", "b"]))
    paused = pause_at(engine, begun, 10, "in_place")
    add(engine, begun, alike, other)
    paused.result(WAIT_S)
    add(engine, queued := response([1, 2], 9, 5, "abq"))
    run(engine, lambda: engine.abort_request("a"))  # not the id of any: no effect
    assert not begun.answer.done()
    run(engine, lambda: engine.abort_request("ab"))
    model = random_model(0)
    for asked, seed in ((begun, 0), (alike, 1)):
        answer = asked.answer.result(WAIT_S)
        assert answer["meta_info"]["finish_reason"]["message"] == "Aborted"
        count = answer["meta_info"]["completion_tokens"]
        assert count == len(answer["output_ids"]) >= 9
        assert sampled(answer) == computed([1, 2], seed, count, [model])
    answer = queued.answer.result(WAIT_S)
    assert answer["meta_info"]["finish_reason"] == {"type": "abort", "message": "Abort in waiting queue"}
    assert answer["output_ids"] == []
    run(engine, engine.resume)
    assert sampled(other.answer.result(WAIT_S)) == computed([1, 2], 2, LONG, [model])


def test_pausing_with_abort_ends_everything(engine: Engine):
    one = response([1, 2], 1, LONG)
    paused = pause_at(engine, one, 3, "abort")
    add(engine, one)
    paused.result(WAIT_S)
    assert one.answer.result(WAIT_S)["meta_info"]["finish_reason"]["type"] == "abort"
    run(engine, engine.flush_cache)


def test_an_abort_after_a_retraction_gives_nothing(engine: Engine):
    one = response([1, 2], 1, LONG, routes_from=0)
    paused = pause_at(engine, one, 3, "retract")
    add(engine, one)
    paused.result(WAIT_S)
    run(engine, lambda: engine.abort(""))
    answer = one.answer.result(WAIT_S)
    assert (answer["output_ids"], answer["meta_info"]["completion_tokens"]) == ([], 0)


def test_what_nobody_waits_for_is_dropped(engine: Engine):
    one = response([1, 2], 1, LONG)
    paused = pause_at(engine, one, 3, "in_place")
    add(engine, one)
    paused.result(WAIT_S)
    assert one.answer.cancel()
    run(engine, engine.flush_cache)  # it holds no cache any more
    run(engine, engine.resume)
    add(engine, other := response([1, 2], 1, 3))  # its id is free again
    assert other.answer.result(WAIT_S)["meta_info"]["completion_tokens"] == 3
    assert run(engine, lambda: len(engine._running)) == 0


def test_an_id_that_is_under_way_is_refused(engine: Engine):
    run(engine, lambda: engine.pause("in_place"))
    add(engine, response([1], 1, 3, "a"))
    with pytest.raises(ValueError, match="Duplicate request ID detected: a"):
        add(engine, response([2], 2, 3, "a"))
    with pytest.raises(ValueError, match="Duplicate request ID detected: b"):
        add(engine, response([2], 2, 3, "b"), response([2], 2, 3, "b"))


def test_a_fault_in_one_response_does_not_end_the_others(engine: Engine):
    broken, sound = response([99], 1, 3), response([1], 1, 3)  # 99 is outside the vocabulary
    add(engine, broken, sound)
    with pytest.raises(IndexError):
        broken.answer.result(WAIT_S)
    assert sound.answer.result(WAIT_S)["meta_info"]["completion_tokens"] == 3


@torch.inference_mode()
def test_routes_are_those_of_each_token(engine: Engine):
    one = response([1, 2, 3], 4, 6, routes_from=1)
    add(engine, one)
    answer = one.answer.result(WAIT_S)
    encoded = b64decode(answer["meta_info"]["routed_experts"])
    routes = np.frombuffer(encoded, "<i4").reshape(7, 2, 2)  # 3 + 6 tokens, less the first and the last
    model, cache = random_model(0), KeyValueCache(architecture(), 9)
    for token in [1, 2, 3, *answer["output_ids"][:-1]]:
        model.step(token, cache)
    wanted = torch.stack(cache.routes_K).view(8, 2, 2)[1:].numpy()
    assert (routes == wanted).all()
    assert len(np.unique(routes)) > 2


def test_a_dense_model_has_no_routes():
    model = Model(architecture(num_experts=0), 16)
    model.load((name, torch.ones(weight.shape)) for name, weight in model.weights.items())
    engine = Engine(model, "0", 1)
    engine.start()
    one = response([1, 2, 3], 4, 6, routes_from=0)
    add(engine, one)
    assert "routed_experts" not in one.answer.result(WAIT_S)["meta_info"]
