"""Routes from the journal's files to a rank's slots: nobody but that rank, for a row at a time, has them in memory."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from minpro_megatron import records
from minpro_megatron.batching.collate import shard_row
from minpro_megatron.batching.routes import refuse_other_routes, shard_routes
from minpro_megatron.batching.row_shard import RankSlice, RowShard
from minpro_megatron.batching.sequences import token_sequences
from minpro_megatron.batching.stored_arrays import read_array, with_routes_read
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.route_files import RouteFiles
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.records import Batch, CollectedGroup, IssuedGroup
from minpro_megatron.serving.client import SamplingParameters
from tests.support.collector_rig import collecting
from tests.support.journal_in_memory import InMemoryFile, in_memory
from tests.support.rollout_fakes import RESPONSES, FakeServers, collected, issued_groups, run_config

LAYERS, CHOSEN, TOKENS, EXPERTS = 4, 2, 300, 128


def group_with_routes(seed: int) -> CollectedGroup:
    random = np.random.default_rng(seed)
    (issued,) = issued_groups([seed])
    num_rows = len(issued.prompt_token_ids) + TOKENS - 1
    first = random.integers(0, EXPERTS - 1, (num_rows, LAYERS, 1), np.uint8)
    routes = np.concatenate([first, first + 1], axis=2)
    return collected(issued, versions=[0] * TOKENS, routes=[routes, routes[::-1].copy()])


def test_a_rank_gets_from_the_files_what_the_servers_gave(tmp_path: Path) -> None:
    group = group_with_routes(seed=0)
    kept: list[CollectedGroup] = []

    async def use(journal: Journal, file: InMemoryFile) -> None:
        await journal.issue([group.issued])
        kept.append(await journal.collect(group, accepted=True))
        (restored,), _ = await journal.restore(0, 1, True)
        assert [one.stored_routes for one in restored.responses] == [one.stored_routes for one in kept[0].responses]

    in_memory(use, tmp_path)
    assert all(response.routed_experts is None for response in kept[0].responses)
    sent = records.encode(Batch(index=0, groups=kept))
    assert len(sent) < len(records.encode(Batch(index=0, groups=[group]))) - 0.9 * routes_bytes(group)

    def shard(batch: Batch) -> RowShard:
        sequences = token_sequences(batch, LossConfig(), max_response_tokens=TOKENS)[0]
        refuse_other_routes(sequences, LAYERS, EXPERTS, CHOSEN)
        return shard_row(sequences, 1024, RankSlice(2, 1, 1, 0))

    read = with_routes_read(shard(records.decode(Batch, sent)))
    found = shard_routes(read, slice(1, 3), EXPERTS, CHOSEN)
    np.testing.assert_array_equal(
        found, shard_routes(shard(Batch(index=0, groups=[group])), slice(1, 3), EXPERTS, CHOSEN)
    )
    (first, _) = read.routed_experts
    assert isinstance(first, np.ndarray)
    with pytest.raises(ValueError, match="read-only"):  # mapped: other ranks see the same bytes
        first[0, 0, 0] = 1


def routes_bytes(group: CollectedGroup) -> int:
    return sum(one.routed_experts.nbytes for one in group.responses if one.routed_experts is not None)


def test_what_is_not_as_the_journal_has_it_is_refused(tmp_path: Path) -> None:
    files, group = RouteFiles(tmp_path), group_with_routes(seed=2)
    stored = files.without_arrays(group, files.write(group)).responses[1].stored_routes
    assert stored is not None
    expected = group.responses[1].routed_experts
    assert expected is not None
    assert read_array(stored).tolist() == expected.tolist()
    path = Path(stored.path)
    for wrong, message in (
        (replace(stored, offset=0), "damaged"),
        (replace(stored, shape=(TOKENS, LAYERS, CHOSEN)), "damaged"),
        (replace(stored, dtype="<f4"), "routes of dtype '<f4'"),
        (replace(stored, path=str(tmp_path / "none")), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=f"^{wrong.path}: .*{message}"):
            read_array(wrong)
    data = path.read_bytes()
    for content in (b"", data[:-1], data[: stored.offset], data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{stored.path}: these routes are damaged"):
            read_array(stored)


def test_the_collector_gives_places_and_no_arrays(tmp_path: Path) -> None:
    class Servers(FakeServers):
        async def collect(self, issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
            await super().collect(issued, sampling)
            return collected(issued, routes=[np.full((3, 2, 1), issued.group_id, np.uint8)] * RESPONSES)

    async def main() -> None:
        async with collecting(run_config(tmp_path, steps=1, delay=0), Servers()) as collector:
            batch = await collector.batch(0, 60)
        assert isinstance(batch, Batch)
        for group in batch.groups:
            for response in group.responses:
                assert response.routed_experts is None
                assert response.stored_routes is not None
                assert read_array(response.stored_routes).tolist() == [[[group.issued.group_id]] * 2] * 3

    asyncio.run(main())
