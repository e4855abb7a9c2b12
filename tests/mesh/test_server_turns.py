"""Memory of GPUs that trainer and servers share is given back when all ranks have freed it."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.publishing.publish import Publisher
from minpro_megatron.publishing.turns import ServerTurns
from minpro_megatron.recipes.demo import tiny_moe
from minpro_megatron.records import PublishLease, ServerAddress
from tests.mesh.harness import run_mesh
from tests.support.recorded_server import OK, RecordedServer


def free_later_on_rank_1(mesh: Mesh, folder: Path) -> tuple[bool, bool]:
    """Whether rank 1 had freed its memory when each rank went on, the first and the second time."""
    turns, found = ServerTurns(tiny_moe(), mesh, None), []
    for name, wait in (("first", turns.await_all_ranks), ("second", turns.returned)):
        if mesh.rank == 1:
            time.sleep(0.5)
            (folder / name).touch()
        wait()
        found.append((folder / name).exists())
    return found[0], found[1]


def test_no_rank_goes_on_before_all_have_freed_their_memory(tmp_path: Path) -> None:
    assert run_mesh(free_later_on_rank_1, tmp_path, data=2) == [(True, True)] * 2


class TwoBuckets:
    """In place of a WeightGatherer."""

    def num_buckets(self, bucket_bytes: int) -> int:
        return 2

    def buckets(self, bucket_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
        for name in "ab":
            yield [(name, torch.ones(3))]


def freed_and_noted(mesh: Mesh, config: RunConfig, server: ServerAddress) -> list[float]:
    """When this rank's allocator has given its memory back during a publication; rank 1 needs half a second for it."""
    freed: list[float] = []

    def empty_cache() -> None:
        time.sleep(0.5 * mesh.rank)
        freed.append(time.monotonic())

    torch.cuda.empty_cache = empty_cache
    publisher = Publisher(config, TwoBuckets(), mesh, lambda pairs: [])  # type: ignore[arg-type]
    lease = PublishLease(version=1, servers=[server], evaluations=[])
    publisher.publish(lease if mesh.rank == 0 else None, changed=False)
    publisher.close()
    return freed


@pytest.mark.parametrize("placement", ["shared", pytest.param("disaggregated", marks=pytest.mark.long)])
def test_servers_get_their_cache_when_every_rank_has_freed_what_the_transfer_needed(
    tmp_path: Path, placement: str
) -> None:
    """The allocator would keep the memory of gathered weights, which the servers' cache may need."""
    facts = {"vocab_size": 8, "eos_token_id": 1, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    settings = [f"model.hf_path={tmp_path}", f"server.placement={placement}", "publish.canary_tokens=0"]
    config = with_overrides(tiny_moe(), [*settings, "publish.transport=shared_memory"])
    server = RecordedServer()
    server.answers["model_info"] = 200, {"weight_version": "1"}
    server.answers["weights_checker"] = 200, OK | {"ranks": [{"checksums": {"a": "1"}}], "per_engine_checksum": "5e"}
    address = ServerAddress(index=0, url=server.url, tensor_parallel=1)
    try:
        freed = run_mesh(freed_and_noted, config, address, data=2)
    finally:
        server.close()
    resumed = [(body["tags"], at) for (path, body), at in zip(server.received, server.times, strict=True)
               if path == "resume_memory_occupation"]  # fmt: skip
    if placement == "disaggregated":
        assert (freed, resumed) == ([[], []], [])
        return
    assert [len(times) for times in freed] == [1, 1]
    assert [tags for tags, _ in resumed] == [["weights"], ["kv_cache"]]
    assert resumed[0][1] < freed[0][0] < freed[1][0] < resumed[1][1]
