"""The control plane against a server in threads that answers like SGLang."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.calls import for_all, start_for_all
from minpro_megatron.serving.control import ControlError, ServerControl

OK = {"success": True, "message": "Success"}


class RecordedServer:
    """Answers each path with what `answers` holds for it (status, JSON or text), and notes what it was sent."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.received: list[tuple[str, Any]] = []
        recorded = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.strip("/")
                recorded.received.append((path, json.loads(body) if body else None))
                status, content = recorded.answers.get(path, (200, OK))
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _answer

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def servers() -> Iterator[list[RecordedServer]]:
    made = [RecordedServer(), RecordedServer()]
    yield made
    for server in made:
        server.close()


@pytest.fixture
def controls(servers: list[RecordedServer]) -> list[ServerControl]:
    return [
        ServerControl(ServerAddress(index=index, url=server.url, tensor_parallel=1), timeout_s=5, vocabulary_size=27)
        for index, server in enumerate(servers)
    ]


def test_a_publication_in_the_form_that_sglang_asks_for(
    servers: list[RecordedServer], controls: list[ServerControl]
) -> None:
    where = {"master_address": "127.0.0.1", "master_port": 4242, "world_size": 3}
    where |= {"group_name": "g", "backend": "gloo"}
    for_all(controls, "pause_generation", mode="retract")
    for_all(controls, "init_weights_update_group", per_server=[{"rank_offset": 1}, {"rank_offset": 2}], **where)
    for_all(controls, "begin_weight_update")
    tensors = {"names": ["a", "b"], "dtypes": ["float32", "float32"], "shapes": [(2, 3), (4,)]}
    receiving = start_for_all(
        controls,
        "update_weights_from_distributed",
        **tensors,
        group_name="g",
        weight_version=7,
        load_format="flattened_bucket",
    )
    assert receiving.wait() == [None, None]
    for_all(controls, "end_weight_update")
    for_all(controls, "flush_cache")
    for_all(controls, "continue_generation")
    for index, server in enumerate(servers):
        assert server.received == [
            ("pause_generation", {"mode": "retract"}),
            ("init_weights_update_group", where | {"rank_offset": index + 1}),
            ("begin_weight_update", {}),
            (
                "update_weights_from_distributed",
                {
                    **tensors,
                    "shapes": [[2, 3], [4]],
                    "group_name": "g",
                    "weight_version": "7",
                    "flush_cache": False,
                    "load_format": "flattened_bucket",
                },
            ),
            ("end_weight_update", {}),
            ("flush_cache", {}),
            ("continue_generation", {}),
        ]


@pytest.mark.parametrize(
    ("status", "content", "reason"),
    [
        (400, {"success": False, "message": "must run between begin and end"}, "must run between begin and end"),
        (200, {"success": False, "message": "unknown group"}, "unknown group"),
        (400, {"error": {"message": "no such mode"}}, "no such mode"),
        (400, {"error": "no such mode"}, "no such mode"),
        (400, "Flush cache failed.\n", "Flush cache failed."),
        (503, "", "Service Unavailable"),
    ],
)
def test_a_failure_names_server_request_and_reason(
    servers: list[RecordedServer], controls: list[ServerControl], status: int, content: Any, reason: str
) -> None:
    servers[1].answers["begin_weight_update"] = (status, content)
    with pytest.raises(ControlError) as caught:
        for_all(controls, "begin_weight_update")
    expected = f"server 1 at {servers[1].url}, begin_weight_update: status {status}: {reason}"
    assert str(caught.value) == expected


def test_all_failures_are_told(servers: list[RecordedServer], controls: list[ServerControl]) -> None:
    for server in servers:
        server.answers["flush_cache"] = (400, "busy")
    with pytest.raises(ControlError, match=r"server 0 .*busy; server 1 .*busy"):
        for_all(controls, "flush_cache")


def test_a_dead_server_is_named() -> None:
    control = ServerControl(ServerAddress(index=3, url="http://127.0.0.1:9", tensor_parallel=1))
    with pytest.raises(ControlError, match=r"server 3 at http://127.0.0.1:9, begin_weight_update: no answer"):
        control.begin_weight_update()


def test_checksum_version_and_canary_are_read(servers: list[RecordedServer], controls: list[ServerControl]) -> None:
    ranks = [{"checksums": {"lm_head.weight": "9c3c"}, "per_gpu_checksum": "a1", "parallelism_info": []}]
    servers[0].answers["weights_checker"] = (200, OK | {"ranks": ranks, "per_engine_checksum": "9780"})
    checksum = controls[0].weights_checksum()
    assert (checksum.engine, checksum.tensors) == ("9780", [{"lm_head.weight": "9c3c"}])

    servers[0].answers["model_info"] = (200, {"model_path": "m", "weight_version": "12"})
    assert controls[0].policy_version() == 12
    servers[0].answers["model_info"] = (200, {"model_path": "m", "weight_version": "default"})
    with pytest.raises(ControlError, match="'default' is no policy version"):
        controls[0].policy_version()

    meta = {"output_token_logprobs": [[-0.5, 4, None], [-0.25, 1, None]], "weight_version": "12"}
    servers[0].answers["generate"] = (200, {"output_ids": [4, 1], "meta_info": meta})
    greedy = controls[0].generate_greedy([3, 20], 2)
    assert (greedy.token_ids, greedy.log_probs, greedy.policy_version) == ([4, 1], [-0.5, -0.25], 12)
    with pytest.raises(ControlError, match="2 tokens, 2 log-probs instead of 3"):
        controls[0].generate_greedy([3, 20], 3)


@pytest.mark.parametrize(
    ("endpoint", "content"),
    [
        ("weights_checker", OK),
        ("weights_checker", OK | {"ranks": [{}], "per_engine_checksum": "1"}),
        ("generate", {"output_ids": [4]}),
        ("generate", {"output_ids": ["x"], "meta_info": {"output_token_logprobs": [[0, 1]], "weight_version": "1"}}),
    ],
)
def test_an_answer_without_the_expected_fields_is_an_error(
    servers: list[RecordedServer], controls: list[ServerControl], endpoint: str, content: Any
) -> None:
    servers[0].answers[endpoint] = (200, content)
    with pytest.raises(ControlError, match="unexpected answer"):
        controls[0].weights_checksum() if endpoint == "weights_checker" else controls[0].generate_greedy([3], 1)


@pytest.mark.parametrize("prompt", [[], [27], [-1]])
def test_a_canary_that_would_end_the_server_is_never_sent(
    servers: list[RecordedServer], controls: list[ServerControl], prompt: list[int]
) -> None:
    with pytest.raises(ValueError, match="vocabulary of 27"):
        controls[0].generate_greedy(prompt, 1)
    assert servers[0].received == []


def test_lists_of_unequal_length_are_refused(controls: list[ServerControl]) -> None:
    with pytest.raises(ValueError, match="lengths 2, 1, 1"):
        controls[0].update_weights_from_distributed(
            names=["a", "b"], dtypes=["float32"], shapes=[[1]], group_name="g", weight_version=1
        )
    with pytest.raises(ValueError, match="1 entries for 2 servers"):
        for_all([controls[0], controls[0]], "begin_weight_update", per_server=[{}])
