"""The control plane against a server in threads that answers like SGLang."""

from collections.abc import Iterator
from typing import Any

import pytest

from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.calls import ServersFailed, for_all, start_for_all
from minpro_megatron.serving.control import GREEDY_TOP_P, ControlError, NoAnswerInTime, ServerControl
from tests.support.recorded_server import OK, RecordedServer


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


def test_all_failures_are_reported(servers: list[RecordedServer], controls: list[ServerControl]) -> None:
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
    with pytest.raises(ControlError, match="'default' is not a policy version"):
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


def test_a_canary_is_greedy_at_the_temperature_asked_for(
    servers: list[RecordedServer], controls: list[ServerControl]
) -> None:
    meta = {"output_token_logprobs": [[-0.5, 4, None]], "weight_version": "1"}
    servers[0].answers["generate"] = (200, {"output_ids": [4], "meta_info": meta})
    controls[0].generate_greedy([3], 1, temperature=0.7)
    sent = servers[0].received[0][1]
    assert sent["extra_key"] == sent["rid"]  # else the prefix cache answers, perhaps of other weights
    # top_k = 1 would be taken for temperature 0, whose log-probs SGLang does not divide
    assert sent["sampling_params"] == {
        "max_new_tokens": 1,
        "temperature": 0.7,
        "top_p": GREEDY_TOP_P,
        "ignore_eos": True,
    }


def test_headers_go_with_every_request(servers: list[RecordedServer]) -> None:
    address = ServerAddress(index=0, url=servers[0].url, tensor_parallel=1)
    control = ServerControl(address, headers={"Authorization": "Bearer secret"})
    control.flush_cache()
    control.within(1.0).model_info()
    assert [headers["Authorization"] for headers in servers[0].headers] == ["Bearer secret"] * 2


def test_a_canary_that_is_late_is_given_up(servers: list[RecordedServer], controls: list[ServerControl]) -> None:
    servers[0].hung = {"generate"}
    with pytest.raises(NoAnswerInTime, match=r"server 0 .*generate: no answer within 0.05 s"):
        controls[0].within(0.05).generate_greedy([3], 1)
    request_id = servers[0].received[0][1]["rid"]
    assert servers[0].received[1:] == [("abort_request", {"rid": request_id})]
    assert len(request_id) == 32  # SGLang aborts every request whose id begins like this


def test_each_server_answers_for_itself(servers: list[RecordedServer], controls: list[ServerControl]) -> None:
    servers[0].answers["model_info"] = (200, {"weight_version": "7"})
    servers[1].answers["model_info"] = (500, "broken")
    calls = start_for_all(controls, "policy_version")
    assert calls.results() == {0: 7}
    assert list(calls.failures()) == [1]
    assert calls.late() == calls.unfinished() == []
    with pytest.raises(ServersFailed) as caught:
        calls.wait()
    assert caught.value.failures == calls.failures()

    servers[0].hung = {"model_info"}
    calls = start_for_all([control.within(0.05) for control in controls], "policy_version")
    assert calls.unfinished() == [0, 1] or calls.unfinished() == [0]
    assert calls.results() == {}
    assert calls.late() == [0]


def test_a_fault_of_this_program_is_no_failure_of_a_server(controls: list[ServerControl]) -> None:
    calls = start_for_all(controls, "generate_greedy", token_ids=[99], num_tokens=1)
    with pytest.raises(ValueError, match="vocabulary of 27"):
        calls.results()
