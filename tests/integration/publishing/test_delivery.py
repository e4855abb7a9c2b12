"""A version's delivery to servers that answer, refuse, hang and disagree."""

import json
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from minpro_megatron.config.publish import PublishConfig
from minpro_megatron.models.model_files import ModelFacts
from minpro_megatron.publishing import delivery as module
from minpro_megatron.publishing.broadcast import GRACE_S, Broadcaster, own_address
from minpro_megatron.publishing.canary import Difference, differences, distinct_continuations
from minpro_megatron.publishing.delivery import Delivery
from minpro_megatron.publishing.held_weights import held_weights
from minpro_megatron.publishing.receivers import Limits, Receivers
from minpro_megatron.publishing.sender import PublishError
from minpro_megatron.records import PublishLease, ServerAddress
from minpro_megatron.serving.answers import AnswerChecker, SentRequest
from minpro_megatron.serving.control import GreedyAnswer, ServerControl
from minpro_megatron.serving.errors import InvalidAnswer
from tests.support.recorded_server import RecordedServer, checksum, two_with_weights

VERSION = 4
FOLDER = Path("/published/version-4")
VERIFIED = ["model_info", "weights_checker"]

MakeDelivery = Callable[..., Delivery]


@pytest.fixture
def servers() -> Iterator[list[RecordedServer]]:
    with two_with_weights(VERSION, hang_s=0.3) as made:
        yield made


@pytest.fixture
def deliver(servers: list[RecordedServer]) -> MakeDelivery:
    def make(
        tensor_parallel: int = 1, requests_in_flight: bool = False, limits: Limits | None = None, **settings: Any
    ) -> Delivery:
        sizes = [1, tensor_parallel]
        addresses = [
            ServerAddress(index=index, url=server.url, tensor_parallel=sizes[index])
            for index, server in enumerate(servers)
        ]
        lease = PublishLease(
            version=VERSION,
            servers=addresses,
            evaluations=[],
            requests_in_flight=requests_in_flight,
            canary_prompts=[[1, 2], [3]],
        )
        config = PublishConfig.model_validate({"transport": "disk", "timeout_s": 30} | settings)
        controls = {address.index: ServerControl(address, config.timeout_s) for address in addresses}
        broadcaster = Broadcaster(torch.device("cpu"), config.timeout_s)
        receivers = Receivers(lease.version, controls, limits or Limits())
        return Delivery(config, lease, receivers, broadcaster, config.transport)

    return make


def test_in_order(servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    delivery = deliver()
    assert delivery.transport == "disk"
    delivery.from_disk(FOLDER, num_bytes=10, written_s=1.0)
    delivery.close()
    for server in servers:
        assert server.paths == ["update_weights_from_disk", "flush_cache", *VERIFIED]
        assert server.received[0][1] == {"model_path": str(FOLDER), "weight_version": "4", "flush_cache": False}
    assert (sorted(delivery.receivers.controls), delivery.receivers.failures) == ([0, 1], {})
    assert (delivery.transport, delivery.used, delivery.checksums) == (None, "disk", {1: "5e"})
    assert delivery.transfer_s > 1.0
    assert delivery.paused_s == 0.0


@pytest.mark.parametrize("mode", ["retract", "abort", "in_place"])
def test_with_requests_in_flight(mode: str, servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    delivery = deliver(requests_in_flight=True, pause_mode=mode)
    delivery.from_disk(FOLDER, num_bytes=10, written_s=0.0)
    delivery.close()
    flush = [] if mode == "in_place" else ["flush_cache"]
    expected = ["pause_generation", "update_weights_from_disk", *flush, "continue_generation", *VERIFIED]
    for server in servers:
        assert server.paths == expected
        assert server.received[0][1] == {"mode": mode}
    assert delivery.paused_s > 0


def test_servers_on_shared_gpus_take_their_memory_back_around_the_transfer(
    servers: list[RecordedServer], deliver: MakeDelivery
) -> None:
    """The cache only once the weights are there; until then no request is let in. A server that fails is left out."""
    servers[1].answers["resume_memory_occupation"] = (500, "no memory")
    delivery = deliver()
    resume = "resume_memory_occupation"
    delivery.take_back()
    delivery.from_disk(FOLDER, num_bytes=10, written_s=0.0)
    assert (servers[0].paths, delivery.transport) == ([resume, "update_weights_from_disk"], None)
    delivery.give_cache()
    delivery.give_cache()  # nothing is done twice
    delivery.close()
    loaded = ["update_weights_from_disk", resume, "continue_generation", "flush_cache", *VERIFIED]
    assert servers[0].paths == [resume, *loaded]
    assert [body for path, body in servers[0].received if path == resume] == [
        {"tags": ["weights"]},
        {"tags": ["kv_cache"]},
    ]
    assert (servers[1].paths, sorted(delivery.receivers.controls)) == ([resume], [0])
    assert "no memory" in delivery.receivers.failures[1]


def test_the_cache_stays_in_the_given_folder(servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    deliver(flush_cache=False).from_disk(FOLDER, num_bytes=10, written_s=0.0)
    assert servers[0].paths == ["update_weights_from_disk", *VERIFIED]


@pytest.mark.parametrize("path", ["update_weights_from_disk", "flush_cache", "weights_checker"])
def test_a_server_that_refuses_is_left_out(path: str, servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    servers[1].answers[path] = (400, {"success": False, "message": "no"})
    delivery = deliver(requests_in_flight=True)
    delivery.from_disk(FOLDER, num_bytes=10, written_s=0.0)
    delivery.close()
    assert sorted(delivery.receivers.controls) == [0]
    assert delivery.receivers.failures == {1: f"server 1 at {servers[1].url}, {path}: status 400: no"}
    # nothing goes on under weights that nobody vouches for, and nothing stays paused
    assert servers[1].paths[-2:] == ["abort_request", "continue_generation"]
    assert servers[1].received[-2][1] == {"abort_all": True}
    assert "abort_request" not in servers[0].paths


def test_a_server_that_hangs_is_left_out(servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    servers[1].hung = {"update_weights_from_disk"}
    delivery = deliver(timeout_s=30)
    delivery.receivers.controls[1] = delivery.receivers.controls[1].within(
        0.1
    )  # the other one may be as slow as it likes
    delivery.from_disk(FOLDER, num_bytes=10, written_s=0.0)
    assert (sorted(delivery.receivers.controls), delivery.receivers.late) == ([0], {1})
    assert "update_weights_from_disk: no answer within 0.1 s" in delivery.receivers.failures[1]


def give_server_1_only(monkeypatch: pytest.MonkeyPatch, limit_s: float) -> None:
    """Of the time for a request that moves no weights; the other one may be as slow as it likes."""

    def at_most(control: ServerControl, timeout_s: float) -> ServerControl:
        assert timeout_s == Limits().quick_request_s
        return control.within(limit_s if control.address.index == 1 else 30)

    monkeypatch.setattr(ServerControl, "at_most", at_most)


@pytest.mark.parametrize("path", ["pause_generation", "flush_cache", "continue_generation", "model_info"])
def test_a_request_that_moves_no_weights_has_a_short_limit(
    path: str, servers: list[RecordedServer], deliver: MakeDelivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_server_1_only(monkeypatch, 0.1)
    servers[1].hung = {path}
    delivery = deliver(requests_in_flight=True, timeout_s=30)
    delivery.from_disk(FOLDER, num_bytes=10, written_s=0.0)
    assert (sorted(delivery.receivers.controls), delivery.receivers.late) == ([0], {1})
    assert "no answer within 0.1 s" in delivery.receivers.failures[1]


@pytest.mark.parametrize("path", ["pause_generation", "begin_weight_update"])
def test_a_broadcast_starts_without_a_server_that_hangs(
    path: str, servers: list[RecordedServer], deliver: MakeDelivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_server_1_only(monkeypatch, 0.1)
    servers[1].hung = {path}
    delivery = deliver(transport="broadcast", requests_in_flight=True, timeout_s=30)
    delivery._pause()
    delivery._begin()
    assert (sorted(delivery.receivers.controls), delivery.receivers.late) == ([0], {1})


def test_a_server_that_refuses_is_not_late(servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    servers[1].answers["flush_cache"] = (400, {"success": False, "message": "no"})
    delivery = deliver()
    delivery.from_disk(FOLDER, num_bytes=10, written_s=0.0)
    assert (sorted(delivery.receivers.failures), delivery.receivers.late) == ([1], set())


def test_it_is_an_error_if_all_refuse_and_none_if_all_are_dead(
    servers: list[RecordedServer], deliver: MakeDelivery
) -> None:
    for server in servers:
        server.answers["update_weights_from_disk"] = (400, {"success": False, "message": "no such folder"})
    with pytest.raises(
        PublishError, match=r"no server loads /published/version-4: server 0 .*no such folder; server 1"
    ):
        deliver().from_disk(FOLDER, num_bytes=10, written_s=0.0)
    for server in servers:
        server.answers["model_info"] = (503, "")
    delivery = deliver()
    delivery.from_disk(FOLDER, num_bytes=10, written_s=0.0)
    assert (delivery.receivers.controls, sorted(delivery.receivers.failures), delivery.transport) == ({}, [0, 1], None)


def test_a_server_must_state_the_version(servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    servers[0].answers["model_info"] = (200, {"weight_version": "3"})
    servers[1].answers["model_info"] = (200, {"weight_version": str(module.INCOMPLETE)})
    delivery = deliver()
    delivery.from_disk(FOLDER, num_bytes=10, written_s=0.0)
    assert delivery.receivers.controls == {}
    assert "it reports version 3 after loading version 4" in delivery.receivers.failures[0]
    assert "it reports version 9999999999" in delivery.receivers.failures[1]


def test_checksums_must_agree(servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    servers[1].answers["weights_checker"] = checksum("6f")
    with pytest.raises(PublishError, match=r"different weights \(checksums server 0: 5e, server 1: 6f\)"):
        deliver().from_disk(FOLDER, num_bytes=10, written_s=0.0)
    # after a broadcast the other way is tried first
    delivery = deliver(transport="broadcast")
    delivery._conclude("broadcast")
    assert delivery.transport == "disk"
    # servers that cut the model differently have different checksums
    delivery = deliver(tensor_parallel=2)
    delivery.from_disk(FOLDER, num_bytes=10, written_s=0.0)
    assert delivery.checksums == {1: "5e", 2: "6f"}


@pytest.fixture
def default_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("default_group")
def test_a_broadcast_that_one_server_refuses_ends_at_once_and_is_repeated_with_the_other(
    servers: list[RecordedServer], deliver: MakeDelivery
) -> None:
    # a session that another trainer left open is closed first
    servers[0].once["begin_weight_update"] = [(400, {"success": False, "message": "already open"})]
    servers[1].answers["init_weights_update_group"] = (400, {"success": False, "message": "no gloo"})
    servers[0].hung = {"init_weights_update_group"}
    delivery = deliver(transport="broadcast", timeout_s=60)
    start = time.monotonic()
    delivery.by_buckets([], num_buckets=1)
    assert time.monotonic() - start < GRACE_S / 2  # neither the time limit nor the time for servers to notice
    assert (sorted(delivery.receivers.controls), delivery.transport, delivery.receivers.late) == (
        [0],
        "broadcast",
        set(),
    )
    assert "init_weights_update_group: status 400: no gloo" in delivery.receivers.failures[1]
    assert servers[0].paths == [
        "begin_weight_update", "end_weight_update", "begin_weight_update", "init_weights_update_group",
        "destroy_weights_update_group", "model_info", "end_weight_update", "weights_checker",
    ]  # fmt: skip


@pytest.mark.usefixtures("default_group")
def test_the_dead_are_left_out_and_the_broadcast_repeated(servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    servers[1].answers["init_weights_update_group"] = servers[1].answers["model_info"] = (503, "")
    servers[0].answers["init_weights_update_group"] = (400, "the group was closed")
    delivery = deliver(transport="broadcast")
    delivery.by_buckets([], num_buckets=1)
    assert (sorted(delivery.receivers.controls), delivery.transport) == ([0], "broadcast")
    assert "init_weights_update_group" in delivery.receivers.failures[1]
    delivery.by_buckets([], num_buckets=1)
    assert delivery.transport == "disk"  # alone, and it still refuses


@pytest.mark.usefixtures("default_group")
@pytest.mark.parametrize("path", ["end_weight_update", "weights_checker"])
def test_a_server_that_a_broken_broadcast_leaves_stuck_is_left_out(
    path: str, servers: list[RecordedServer], deliver: MakeDelivery
) -> None:
    """Its HTTP process goes on answering /model_info."""
    limits = Limits(clean_up_s=0.1) if path == "end_weight_update" else Limits(proof_s=0.1)
    for server in servers:
        server.answers["init_weights_update_group"] = (400, "the group was closed")
        server.answers["end_weight_update"] = (400, "no session is open")
    servers[1].hung = {path}
    delivery = deliver(transport="broadcast", limits=limits)
    delivery.by_buckets([], num_buckets=1)
    assert (sorted(delivery.receivers.controls), delivery.transport) == ([0], "broadcast")
    assert f"{path}: no answer within 0.1 s, after a failed transfer; it is restarted" in delivery.receivers.failures[1]
    assert delivery.receivers.late == {1}
    servers[0].answers["weights_checker"] = (400, "CUDA error")
    delivery.by_buckets([], num_buckets=1)
    assert (delivery.receivers.controls, delivery.transport) == ({}, None)


def greedy(*pairs: tuple[int, float]) -> GreedyAnswer:
    return GreedyAnswer(
        token_ids=[token for token, _ in pairs], log_probs=[log_prob for _, log_prob in pairs], policy_version=VERSION
    )


def test_canaries_are_compared_with_the_trainers_log_probs() -> None:
    same = greedy((5, -0.5))
    answers = {
        3: [greedy((7, -1.0), (8, -2.0)), same],
        1: [greedy((7, -1.5), (8, -2.0)), same],
        2: [greedy((7, -1.0), (9, -0.25)), same],
    }
    continuations = distinct_continuations(answers)
    assert continuations == [(0, (7, 8)), (0, (7, 9)), (1, (5,))]
    ours = [np.array([-1.0, -2.25], np.float32), np.array([-1.0, np.nan], np.float32), np.array([-0.5], np.float32)]
    found = differences(answers, continuations, ours)
    assert found[3] == Difference(pytest.approx(0.25 / 3), 0.25)  # type: ignore[arg-type]
    assert found[1] == Difference(0.25, 0.5)
    assert np.isnan(found[2].mean)


def test_the_fault_is_the_servers_own_where_others_hold_the_version(
    servers: list[RecordedServer], deliver: MakeDelivery
) -> None:
    alone = deliver()
    alone.published = {1: "5e"}
    alone.compare({0: Difference(1.2, 1.3), 1: Difference(1.2, 1.3)})
    assert list(alone.receivers.controls) == []
    servers[1].answers["weights_checker"] = checksum("6f")
    delivery = deliver()
    delivery.published = {1: "6f"}
    delivery.from_disk(FOLDER, num_bytes=10, written_s=0.0)
    assert list(delivery.receivers.controls) == [1]
    assert "its weights differ from the others" in delivery.receivers.failures[0]


def test_a_canary_that_is_off_leaves_its_server_out_and_all_of_them_are_an_error(deliver: MakeDelivery) -> None:
    delivery = deliver(canary_tolerance=0.1)
    delivery.compare({0: Difference(0.1, 0.3), 1: Difference(float("nan"), float("nan"))})
    assert list(delivery.receivers.controls) == [0]
    assert "canary log-probs differ from the trainer's by nan nats per token" in delivery.receivers.failures[1]
    with pytest.raises(PublishError, match=r"server 0 .* 1.2 nats.*server 1 .*sampling.temperature"):
        deliver().compare({0: Difference(1.2, 1.3), 1: Difference(1.1, 2)})
    deliver().compare({})


def test_servers_that_are_not_clearly_broken_stay_and_are_named(
    deliver: MakeDelivery, caplog: pytest.LogCaptureFixture
) -> None:
    """Their checksums agree: engines that round differently must not end a run of days."""
    delivery = deliver()
    delivery.compare({0: Difference(0.9, 4.0), 1: Difference(0.01, 0.3)})
    assert (sorted(delivery.receivers.controls), delivery.receivers.failures) == ([0, 1], {})
    assert [record.getMessage() for record in caplog.records] == [
        "version 4: server 0: canary log-probs differ from the trainer's by 0.9 nats per token, 4 at most"
    ]


def test_every_server_continues_every_prompt(servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    meta = {"output_token_logprobs": [[-0.5, 4, None]], "weight_version": "4"}
    for server in servers:
        server.answers["generate"] = (200, {"output_ids": [4], "meta_info": meta})
    delivery = deliver()
    delivery.ask_canaries(1, temperature=0.7)
    assert {index: len(answers) for index, answers in delivery.canaries.items()} == {0: 2, 1: 2}
    for server in servers:
        assert sorted(body["input_ids"] for path, body in server.received if path == "generate") == [[1, 2], [3]]
    servers[1].once["generate"] = [(500, "broken")]
    broken = deliver()
    broken.ask_canaries(1, temperature=0.7)
    assert (list(broken.canaries), list(broken.receivers.controls)) == ([0], [0])
    assert "generate: status 500" in broken.receivers.failures[1]


def test_canaries_that_are_late(
    servers: list[RecordedServer], deliver: MakeDelivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = {"output_token_logprobs": [[-0.5, 4, None]], "weight_version": "4"}
    for server in servers:
        server.answers["generate"] = (200, {"output_ids": [4], "meta_info": meta})
    servers[1].hung = {"generate"}
    # the other one may be as slow as it likes
    monkeypatch.setattr(
        module,
        "within",
        lambda limit_s, controls: [one.within(limit_s if one.address.index == 1 else 30) for one in controls],
    )
    busy = deliver(requests_in_flight=True, limits=Limits(canary_patience_s=0.05))
    busy.ask_canaries(1, temperature=0.7)
    assert (list(busy.canaries), sorted(busy.receivers.controls)) == (
        [0],
        [0, 1],
    )  # it is busy, and its checksum is right
    idle = deliver(timeout_s=0.05)
    idle.ask_canaries(1, temperature=0.7)
    assert sorted(idle.receivers.controls) == [0]
    none = deliver()
    none.ask_canaries(0, temperature=0.7)
    assert none.canaries == {}


def test_what_the_servers_start_with(servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    servers[0].answers["model_info"] = (200, {"weight_version": "0"})
    servers[1].answers["weights_checker"] = checksum("6f")
    assert held_weights(deliver().receivers.controls.values()) == (0, {1: "5e"})
    for server in servers:
        server.answers["model_info"] = (200, {"weight_version": "default"})
    assert held_weights(deliver().receivers.controls.values()) is None


def test_the_address_that_servers_can_reach() -> None:
    here = ServerAddress(index=0, url="http://127.0.0.1:30000", tensor_parallel=1)
    assert own_address([here]) == "127.0.0.1"
    other = ServerAddress(index=1, url="http://127.5.6.7:30000", tensor_parallel=1)
    assert own_address([here, other]).startswith("127.")


def test_tokens_of_incomplete_weights_are_refused() -> None:
    facts = ModelFacts(vocabulary_size=27, stop_token_ids=(1,), max_position_embeddings=64)
    checker = AnswerChecker("server 0", facts, exact_versions=False)
    meta = {
        "id": "r", "finish_reason": {"type": "length"}, "prompt_tokens": 1, "completion_tokens": 1,
        "output_token_logprobs": [[-0.5, 4, None]],
    }  # fmt: skip
    request = SentRequest("r", 1, 1, 3)

    def check(version: int) -> np.ndarray:
        spans = [{"version": str(version), "start": 0, "end": 1}]
        body = json.dumps([{"output_ids": [4], "meta_info": meta | {"weight_versions": spans}}])
        return checker.check(body.encode(), [request])[0].policy_versions

    assert check(VERSION).tolist() == [VERSION]
    with pytest.raises(InvalidAnswer, match="'9999999999' is not a policy version"):
        check(module.INCOMPLETE)


class Recorder(Broadcaster):
    """Takes every bucket and sends none."""

    def __init__(self) -> None:
        self.sent: list[tuple[list[str], int | str]] = []

    def connect(self, controls: object) -> None:
        pass

    def send(self, bucket: Sequence[tuple[str, torch.Tensor]], weight_version: int | str) -> None:
        self.sent.append(([name for name, _ in bucket], weight_version))

    def finish(self) -> None:
        pass


def test_only_the_last_bucket_makes_it_the_version(servers: list[RecordedServer], deliver: MakeDelivery) -> None:
    delivery = deliver(transport="broadcast")
    delivery.sender = recorder = Recorder()
    delivery.by_buckets(iter([[("a", torch.ones(3))], [("b", torch.ones(2))]]), num_buckets=2)
    assert recorder.sent == [(["a"], module.INCOMPLETE), (["b"], VERSION)]
    assert (delivery.num_bytes, delivery.used, delivery.transport) == (20, "broadcast", None)
    assert servers[0].paths == ["begin_weight_update", "end_weight_update", "flush_cache", *VERIFIED]


def test_a_buckets_tensors_are_released_before_the_next_are_gathered(deliver: MakeDelivery) -> None:
    delivery, alive = deliver(transport="broadcast"), []
    delivery.sender = Recorder()

    def gathered() -> Iterator[list[tuple[str, torch.Tensor]]]:
        previous: list[weakref.ref] = []

        def watched(tensor: torch.Tensor) -> torch.Tensor:
            previous.append(weakref.ref(tensor))
            return tensor

        for name in ("a", "b", "c"):
            alive.append(sum(reference() is not None for reference in previous))
            yield [(name, watched(torch.ones(3)))]

    delivery.by_buckets(gathered(), num_buckets=3)
    assert alive == [0, 0, 0]
