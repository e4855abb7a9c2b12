"""The reference engine's HTTP: statuses and answers are those recorded of SGLang 0.5.23."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from safetensors.torch import save_file

from minpro_megatron.reference_engine import memory
from minpro_megatron.reference_engine.engine import Engine
from minpro_megatron.reference_engine.model import Model
from minpro_megatron.reference_engine.server import Server
from tests.support.reference_models import computed, random_model, random_tensors, sampled, spans

STOP_TOKEN = 31
SEEDED = {"max_new_tokens": 4, "sampling_seed": 5, "ignore_eos": True}


class Post:
    """Posts JSON to the server; the answer's status and content."""

    def __init__(self, client: TestClient, engine: Engine) -> None:
        self._client, self._engine = client, engine

    async def __call__(self, path: str, content: object = None, method: str = "POST", **extra: Any) -> tuple[int, Any]:
        data = content if isinstance(content, bytes) else json.dumps({} if content is None else content)
        async with self._client.request(method, path, data=data, **extra) as response:
            text = await response.text()
            return response.status, json.loads(text) if response.content_type == "application/json" else text

    async def until_under_way(self, count: int) -> None:
        while await asyncio.wrap_future(self._engine.call(lambda: len(self._engine._under_way()))) < count:
            await asyncio.sleep(0.001)


def serve(test: Callable[[Post], Coroutine[Any, Any, None]], api_key: str | None = None) -> None:
    """Runs `test` with a function that posts JSON and gives status and answer."""

    async def main() -> None:
        engine = Engine(random_model(0), "0", 8)
        engine.start()
        server = Server(engine, "models/first", (STOP_TOKEN,), context_length=64, api_key=api_key)
        async with TestClient(TestServer(server.application())) as client:
            await test(Post(client, engine))

    asyncio.run(main())


def greedy(input_ids: object, num_tokens: int = 4, **fields: object) -> dict[str, Any]:
    parameters = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return {"input_ids": input_ids, "sampling_params": parameters, "return_logprob": True, **fields}


def test_a_token_is_promised_only_while_the_sampling_thread_works():
    async def test(ask: Post) -> None:
        assert (await ask("/health_generate", method="GET"))[0] == 200
        go_on = threading.Event()
        stuck = ask._engine.call(go_on.wait)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask("/health_generate", method="GET"), 0.05)
        assert (await ask("/model_info", method="GET"))[0] == 200
        go_on.set()
        assert await asyncio.wrap_future(stuck)

    serve(test)


def test_a_list_of_prompts_has_a_list_of_answers():
    async def test(ask: Post) -> None:
        parameters = [{"max_new_tokens": 5, "sampling_seed": seed, "ignore_eos": True} for seed in (1, 2)]
        request = {"input_ids": [[1, 2], [3]], "sampling_params": parameters, "rid": ["a", "b"], "return_logprob": True}
        status, answers = await ask("/generate", request)
        assert status == 200
        assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b"]
        assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [2, 1]
        model = random_model(0)
        assert sampled(answers[0]) == computed([1, 2], 1, 5, [model])
        assert sampled(answers[1]) == computed([3], 2, 5, [model])
        assert spans(answers[0]) == [("0", 0, 5)]
        status, answer = await ask("/generate", greedy([1, 2], unknown_field=1))
        assert (status, len(answer["output_ids"])) == (200, 4)
        _, without = await ask("/generate", greedy([1, 2], return_logprob=False))
        assert "output_token_logprobs" not in without["meta_info"]
        assert without["output_ids"] == answer["output_ids"]

    serve(test)


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (greedy([]), "input_ids cannot be empty"),
        (greedy([[1], []]), "input_ids cannot be empty"),
        (greedy([1, 32]), "outside the vocabulary of 32"),
        (greedy([-1]), "outside the vocabulary of 32"),
        (greedy([1, [2]]), "token ids, or lists of token ids"),
        (greedy([1] * 60, num_tokens=5), "total of 65 tokens: 60 tokens from"),
        (greedy([1], rid=["a", "b"]), "1 input_ids, 1 sampling_params and 2 rid"),
        (greedy([[1], [2]], rid=["a", "a"]), "Duplicate request ID detected: a"),
        (greedy([1, 2], return_routed_experts=True, routed_experts_start_len=3), "routed_experts_start_len=3"),
        (greedy([1], stream=True), "stream"),
        (greedy([1], return_sampling_mask=True), "return_sampling_mask requires top_k=1"),
        ({"input_ids": [1], "sampling_params": {"bogus": 1}}, "unknown field `bogus`"),
        ({"input_ids": [1], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"input_ids": "text"}, "input_ids"),
        ({}, "missing required field `input_ids`"),
        (b"{", "truncated"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(request_, problem):
    async def test(ask: Post) -> None:
        status, answer = await ask("/generate", request_)
        assert status == 400
        assert problem in answer["error"]["message"]

    serve(test)


def test_updates_stand_between_begin_and_end():
    tensors = {"names": ["model.norm.weight"], "dtypes": ["float32"], "shapes": [[16]], "group_name": "none"}

    async def test(ask: Post) -> None:
        async def refused(path: str, message: str, content: object = None) -> None:
            status, answer = await ask(path, content)
            assert (status, answer["success"]) == (400, False)
            assert message in answer["message"]

        await refused("/end_weight_update", "no weight-update session is open")
        await refused("/update_weights_from_distributed", "must run between begin_weight_update()", tensors)
        assert await ask("/begin_weight_update") == (200, {"success": True, "message": "Success"})
        await refused("/begin_weight_update", "a weight-update session is already open")
        await refused("/update_weights_from_distributed", "Group none not in []", tensors)
        assert await ask("/end_weight_update") == (200, {"success": True, "message": "Success"})
        await refused("/end_weight_update", "no weight-update session is open")
        await refused("/destroy_weights_update_group", "does not exist", {"group_name": "none"})
        group = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1, "world_size": 2, "backend": "nccl"}
        await refused("/init_weights_update_group", "backend = 'nccl'", group)

    serve(test)


def test_weights_come_from_a_folder_also_during_a_pause(tmp_path: Path):
    save_file(dict(random_tensors(1)), tmp_path / "model.safetensors")
    (tmp_path / "less").mkdir()
    save_file(dict(random_tensors(1)[:5]), tmp_path / "less" / "model.safetensors")

    async def test(ask: Post) -> None:
        async def update(folder: Path, version: str, flush: bool = True) -> tuple[int, Any]:
            fields = {"model_path": str(folder), "weight_version": version, "flush_cache": flush}
            return await ask("/update_weights_from_disk", fields)

        before = (await ask("/weights_checker", {"action": "checksum"}))[1]
        for folder, problem in ((tmp_path / "none", "none"), (tmp_path / "less", "missing")):
            status, answer = await update(folder, "9")
            assert (status, answer["success"]) == (400, False)
            assert problem in answer["message"]
        assert (await ask("/weights_checker", {"action": "checksum"}))[1] == before
        paused = {"message": "Generation paused successfully.", "status": "ok"}
        assert await ask("/pause_generation", {"mode": "retract"}) == (200, paused)
        waiting = asyncio.create_task(ask("/generate", greedy([1, 2])))
        assert (await update(tmp_path, "7"))[0] == 200
        after = (await ask("/weights_checker", {"action": "checksum"}))[1]
        assert (
            after["ranks"][0]["checksums"].keys()
            == before["ranks"][0]["checksums"].keys()
            == dict(random_tensors(1)).keys()
        )
        assert after["per_engine_checksum"] != before["per_engine_checksum"]
        assert await ask("/server_info", method="GET") == (200, {"disable_overlap_schedule": True})
        _, info = await ask("/model_info", method="GET")
        assert (info["weight_version"], info["model_path"]) == ("7", str(tmp_path))
        assert not waiting.done()
        continued = {"message": "Generation continued successfully.", "status": "ok"}
        assert await ask("/continue_generation") == (200, continued)
        assert spans((await waiting)[1]) == [("7", 0, 4)]

    serve(test)


def test_a_version_can_change_without_the_weights():
    async def test(ask: Post) -> None:
        await ask("/pause_generation", {"mode": "in_place"})
        many = {"max_new_tokens": 40, "sampling_seed": 3, "ignore_eos": True}
        request = {"input_ids": [1], "sampling_params": many, "return_logprob": True}
        tasks = [asyncio.create_task(ask("/generate", request))]
        await ask.until_under_way(1)
        version = {"new_version": "7", "abort_all_requests": False}
        status, answer = await ask("/update_weight_version", version)
        assert (status, answer) == (200, {"success": True, "message": "Weight version updated to 7"})
        assert (await ask("/model_info", method="GET"))[1]["weight_version"] == "7"
        await ask("/continue_generation")
        _, waited = await tasks[0]
        assert sampled(waited) == computed([1], 3, 40, [random_model(0)])  # not aborted, and of the same weights
        assert spans(waited) == [("7", 0, 40)]
        _, after = await ask("/generate", greedy([1, 2]))
        assert spans(after) == [("7", 0, 4)]
        status, answer = await ask("/update_weight_version", {"abort_all_requests": False})
        assert status == 400
        assert "new_version" in answer["error"]["message"]

    serve(test)


def test_a_cache_in_use_is_not_flushed(tmp_path: Path):
    save_file(dict(random_tensors(1)), tmp_path / "model.safetensors")

    async def test(ask: Post) -> None:
        generating = asyncio.create_task(ask("/generate", greedy([1, 2], num_tokens=60)))
        while (await ask("/flush_cache", method="GET"))[0] == 200:  # until the response has begun
            await asyncio.sleep(0)
        await ask("/pause_generation", {"mode": "in_place"})
        assert await ask("/flush_cache") == (400, "Flush cache failed.\n")
        status, answer = await ask("/update_weights_from_disk", {"model_path": str(tmp_path), "weight_version": "1"})
        assert status == 400
        assert "Weights were updated, but the cache was not flushed" in answer["message"]
        await ask("/continue_generation")
        assert [version for version, *_ in spans((await generating)[1])] == ["0", "1"]
        assert (await ask("/flush_cache"))[0] == 200

    serve(test)


def test_released_weights_take_no_memory_and_come_back_when_they_are_sent(tmp_path: Path):
    save_file(dict(random_tensors(1)), tmp_path / "model.safetensors")
    both = {"tags": ["kv_cache", "weights"]}

    async def test(ask: Post) -> None:
        model = ask._engine.model
        num_bytes = sum(weight.nbytes for weight in model.weights.values())
        assert occupied(model) == num_bytes
        before = await ask("/weights_checker", {"action": "checksum"})
        await ask("/generate", greedy([1, 2]))
        assert await ask("/pause_generation", {"mode": "abort"}) == (
            200,
            {"message": "Generation paused successfully.", "status": "ok"},
        )
        assert await ask("/release_memory_occupation", both) == (200, None)
        assert occupied(model) == 0
        assert (await ask("/model_info", method="GET"))[1]["weight_version"] == "0"
        status, answer = await ask("/weights_checker", {"action": "checksum"})
        assert (status, answer["message"]) == (400, "the weights are released")
        waiting = asyncio.create_task(ask("/generate", greedy([1, 2])))
        assert await ask("/resume_memory_occupation", {"tags": ["weights"]}) == (200, None)
        assert occupied(model) == num_bytes
        assert all(weight.isnan().all() for weight in model.weights.values())
        loaded = {"model_path": str(tmp_path), "weight_version": "1", "flush_cache": False}
        assert (await ask("/update_weights_from_disk", loaded))[0] == 200
        assert (await ask("/weights_checker", {"action": "checksum"}))[1] != before[1]
        assert await ask("/resume_memory_occupation", {"tags": ["kv_cache"]}) == (200, None)
        assert (await ask("/continue_generation"))[0] == 200
        _, answer = await waiting
        assert spans(answer) == [("1", 0, 4)]
        request = {"input_ids": [1, 2], "sampling_params": SEEDED, "return_logprob": True}
        _, after = await ask("/generate", request)
        assert sampled(after) == computed([1, 2], 5, 4, [random_model(1)])

    serve(test)


def occupied(model: Model) -> int:
    """Bytes of the weights in memory."""
    blocks = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in model.weights.values()}
    return sum(block.nbytes() for block in blocks.values())


@pytest.mark.parametrize("path", ["/release_memory_occupation", "/resume_memory_occupation"])
def test_what_ends_sglang_ends_the_engine(path: str, monkeypatch: pytest.MonkeyPatch):
    """A release while a response is under way, and the resumption of what was not released."""

    class Ended(Exception):
        pass

    def end(why: str) -> None:
        raise Ended(why)

    monkeypatch.setattr(memory, "end_process", end)

    async def test(ask: Post) -> None:
        go_on, calls = threading.Event(), ask._engine._calls
        stuck = ask._engine.call(go_on.wait)
        generating = asyncio.create_task(ask("/generate", greedy([1])))
        while calls.qsize() < 1:
            await asyncio.sleep(0.001)
        asked = asyncio.create_task(ask(path, {"tags": ["weights"]}))
        while calls.qsize() < 2:
            await asyncio.sleep(0.001)
        go_on.set()
        assert (await asked)[0] == 500
        assert len((await generating)[1]["output_ids"]) == 4  # nothing was freed
        assert await asyncio.wrap_future(stuck)
        status, answer = await ask(path, {"tags": ["all of it"]})
        assert status == 400
        assert "all of it" in answer["error"]["message"]

    serve(test)


def test_requests_are_aborted_by_id_or_all():
    async def test(ask: Post) -> None:
        await ask("/pause_generation", {"mode": "in_place"})
        tasks = [asyncio.create_task(ask("/generate", greedy([1], rid=rid))) for rid in ("a", "b", "c")]
        await ask.until_under_way(3)
        assert await ask("/abort_request", {"rid": "a"}) == (200, "")
        assert (await tasks[0])[1]["meta_info"]["finish_reason"]["type"] == "abort"
        assert await ask("/abort_request", {}) == (200, "")
        assert [task.done() for task in tasks] == [True, False, False]
        assert await ask("/abort_request", {"abort_all": True}) == (200, "")
        for task in tasks[1:]:
            assert (await task)[1]["meta_info"]["finish_reason"]["type"] == "abort"

    serve(test)


def test_an_api_key_is_asked_for_everywhere_but_at_health():
    async def test(ask: Post) -> None:
        assert (await ask("/health", method="GET"))[0] == 200
        for headers in ({}, {"Authorization": "Bearer other"}):
            assert await ask("/model_info", method="GET", headers=headers) == (401, {"error": "Unauthorized"})
            assert (await ask("/generate", greedy([1]), headers=headers))[0] == 401
        assert (await ask("/generate", greedy([1]), headers={"Authorization": "Bearer secret"}))[0] == 200

    serve(test, api_key="secret")


def test_the_collector_of_garbage_is_relieved():
    async def test(ask: Post) -> None:
        assert (await ask("/freeze_gc"))[0] == 200

    import gc

    before = gc.get_freeze_count()
    serve(test)
    assert gc.get_freeze_count() > before
    gc.unfreeze()
