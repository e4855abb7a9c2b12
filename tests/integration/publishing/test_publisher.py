"""Several publications of one trainer: what a broadcast that left no server changes, and what version 0 must be."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from minpro_megatron.config.publish import PublishConfig
from minpro_megatron.publishing.publish import Publisher
from minpro_megatron.publishing.publish_report import PublishReport, publication_metrics
from minpro_megatron.publishing.receivers import Limits
from minpro_megatron.publishing.sender import PublishError
from minpro_megatron.records import PublishLease, ServerAddress
from tests.support.recorded_server import RecordedServer, checksum, two_with_weights
from tests.support.run_examples import example_config, write_example_files

VERSION = 4
LOADED = ["update_weights_from_disk", "flush_cache", "model_info", "weights_checker"]


@pytest.fixture
def servers() -> Iterator[list[RecordedServer]]:
    with two_with_weights(VERSION, hang_s=2) as made:
        yield made


@pytest.fixture
def publisher(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Publisher]:
    """That of a trainer of one rank, whose model has one tensor. The parameter is the transport."""
    write_example_files(tmp_path)
    settings = PublishConfig(transport=getattr(request, "param", "broadcast"), timeout_s=30, canary_tokens=0)
    rank: Any = SimpleNamespace(rank=0, device=torch.device("cpu"), from_rank_0=lambda value: value)
    model: Any = SimpleNamespace(buckets=lambda _: iter([[("a", torch.ones(3))]]), num_buckets=lambda _: 1)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield Publisher(
        example_config(tmp_path, publish=settings), model, rank, lambda _: [], Limits(clean_up_s=0.2, proof_s=0.2)
    )
    dist.destroy_process_group()


def publish(
    publisher: Publisher, servers: list[RecordedServer], version: int = VERSION, only: Sequence[int] = (0, 1)
) -> PublishReport:
    """The report of the publication to these servers; `paths` of each is then that of this publication alone."""
    for server in servers:
        server.received.clear()
    addresses = [ServerAddress(index=index, url=server.url, tensor_parallel=1) for index, server in enumerate(servers)]
    addresses = [addresses[index] for index in only]
    report = publisher.publish(PublishLease(version=version, servers=addresses, evaluations=[]), changed=False)
    assert report is not None
    return report


def test_servers_that_were_restarted_because_of_the_broadcast_load_from_disk(
    servers: list[RecordedServer], publisher: Publisher, caplog: pytest.LogCaptureFixture
) -> None:
    """As behind a firewall: the servers' HTTP processes answer, those that hold the weights wait in the broadcast."""
    for server in servers:
        server.answers["init_weights_update_group"] = (400, "the group was closed")
        server.hung = {"end_weight_update"}
    lost = publish(publisher, servers)
    assert (lost.held_by, lost.late, lost.transport, lost.fell_back) == ([], [0, 1], None, False)
    for server in servers:
        server.hung = set()  # restarted
    with caplog.at_level(logging.WARNING):
        found = publish(publisher, servers)
    assert (found.held_by, found.transport, found.fell_back) == ([0, 1], "disk", True)
    assert [server.paths for server in servers] == [LOADED, LOADED]
    assert "version 4: servers load from disk" in caplog.text
    assert publication_metrics([lost, found])["publish/fallbacks"] == 1
    assert publish(publisher, servers).transport == "disk"  # the broadcast has never worked


def test_a_broadcast_that_every_server_refuses_is_not_tried_at_every_version(
    servers: list[RecordedServer], publisher: Publisher
) -> None:
    """Each attempt could wait for publish.timeout_s."""
    for server in servers:
        server.answers["init_weights_update_group"] = (400, "no route to host")
    first = publish(publisher, servers)
    assert (first.held_by, first.transport, first.fell_back) == ([0, 1], "disk", True)
    assert "init_weights_update_group" in servers[0].paths
    assert (publish(publisher, servers).held_by, servers[0].paths) == ([0, 1], LOADED)


BY_MEMORY = pytest.mark.parametrize("publisher", ["shared_memory"], indirect=True)  # servers need not take part in it
REFUSED = (400, "no such tensor")


@BY_MEMORY
def test_a_server_that_refuses_a_transfer_does_not_send_the_others_to_disk(
    servers: list[RecordedServer], publisher: Publisher
) -> None:
    servers[1].answers["update_weights_from_tensor"] = REFUSED
    for version in (4, 5, 6):
        for server in servers:
            server.answers["model_info"] = (200, {"weight_version": str(version)})
        found = publish(publisher, servers, version)
        assert (found.held_by, found.transport, found.fell_back) == ([0], "shared_memory", False)
        assert "update_weights_from_tensor: status 400: no such tensor" in found.failures[1]


@BY_MEMORY
def test_a_server_that_refuses_its_own_publication_does_not_send_the_others_to_disk(
    servers: list[RecordedServer], publisher: Publisher
) -> None:
    """Of the version that the others hold, as after a restart."""
    servers[1].answers["update_weights_from_tensor"] = REFUSED
    publish(publisher, servers)
    for _ in range(3):
        assert publish(publisher, servers, only=[1]).transport == "disk"
    assert publish(publisher, servers, only=[0]).transport == "shared_memory"


@pytest.mark.parametrize("received", ["5e", "6f"])
def test_version_0_must_be_what_the_servers_loaded(
    received: str, servers: list[RecordedServer], publisher: Publisher
) -> None:
    for server in servers:
        server.answers["init_weights_update_group"] = (400, "no route to host")  # the disk needs no receiver
        server.answers["model_info"] = (200, {"weight_version": "0"})
        # asked before the transfer, after the broadcast, of which nothing has arrived, and at the end
        server.once["weights_checker"] = [checksum("5e"), checksum("5e")]
        server.answers["weights_checker"] = checksum(received)
    if received == "5e":
        assert publish(publisher, servers, version=0).held_by == [0, 1]
        return
    with pytest.raises(PublishError, match="publishing version 0: the trainer's weights are not those of the servers"):
        publish(publisher, servers, version=0)
