"""How long the servers' routes (R3) and kept ids stay in the run folder, and for which requests they are asked."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from minpro_megatron.buffer.journal_reader import JournalReader
from minpro_megatron.buffer.route_files import FOLDER
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.records import CollectedGroup, CollectorTotals, IssuedGroup
from minpro_megatron.serving.client import SamplingParameters
from tests.support.collector_rig import Crash, FakeTrainer, collecting, contents
from tests.support.rollout_fakes import NUM_PROMPTS, FakeServers, run_config
from tests.support.whole_runs import NUM_REQUESTS, check_run, undisturbed

__all__ = ["undisturbed"]  # a fixture

STEPS = 4


ROUTES, SUPPORTS = "model.routing_replay=rollout", "sampling.top_k=20"


def config_of(folder: Path, *overrides: str, bounded: bool = False, replayed: str = ROUTES) -> RunConfig:
    config = run_config(folder, steps=STEPS, evaluate_every=1, max_staleness=2 if bounded else 0)
    pause = ["publish.pause_mode=abort"] if bounded else []
    return with_overrides(config, [*pause, replayed, *overrides])


def run_to_the_end(config: RunConfig, servers: FakeServers, checkpoint_every: int) -> None:
    async def main() -> None:
        async with collecting(config, servers) as collector:
            await FakeTrainer(config, checkpoint_every).run(collector)
            if collector._retention.pruning is not None:
                await collector._retention.pruning

    asyncio.run(main())


def steps_with_files(config: RunConfig) -> list[int]:
    """Of the steps that consumed them; files and journal agree about it."""
    with JournalReader(config.run_dir) as reader:
        groups = [group for group in reader.groups() if any(one.routes or one.supports for one in group.responses)]
    files = sorted(int(path.stem) for path in (config.run_dir / FOLDER).iterdir())
    assert [group.group_id for group in groups] == files
    return sorted({group.consumed_step for group in groups if group.consumed_step is not None})


@pytest.mark.parametrize("replayed", [ROUTES, SUPPORTS])
@pytest.mark.parametrize(
    ("overrides", "checkpoint_every", "kept"),
    [
        ([], 3, [3]),  # the checkpoint of version 3 includes steps 0 to 2
        ([], 99, [0, 1, 2, 3]),  # none is complete yet
        (["checkpoint.every_steps=0"], 99, []),  # a crash would begin again, with new samples
        (["collector.journal_keep_routes=true"], 1, [0, 1, 2, 3]),
        (["collector.journal_keep_routes=true", "collector.journal_keep_steps=1"], 2, [3]),
    ],
)
def test_routes_stay_until_a_checkpoint_includes_the_step(
    tmp_path: Path, overrides: list[str], checkpoint_every: int, kept: list[int], replayed: str
) -> None:
    config = config_of(tmp_path, *overrides, replayed=replayed)
    run_to_the_end(config, FakeServers(2), checkpoint_every)
    assert steps_with_files(config) == kept
    with JournalReader(config.run_dir) as reader:
        whole = [step.step for step in reader.steps().values() if step.num_whole == step.num_responses]
    assert whole == ([3] if "collector.journal_keep_steps=1" in overrides else [0, 1, 2, 3])


class NotingServers(FakeServers):
    """Notes for which groups routes and kept ids were asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[bool, bool, int, float]] = []

    async def collect(self, issued: IssuedGroup, sampling: SamplingParameters) -> CollectedGroup:
        self.asked.append((sampling.with_routes, sampling.with_supports, sampling.top_k, sampling.top_p))
        return await super().collect(issued, sampling)


@pytest.mark.parametrize(
    ("overrides", "asked"),
    [
        ([ROUTES], (True, False, 0, 1.0)),
        ([SUPPORTS, "sampling.top_p=0.9"], (False, True, 20, 0.9)),
        ([ROUTES, SUPPORTS], (True, True, 20, 1.0)),
    ],
)
def test_they_are_asked_of_groups_that_are_trained_on_and_not_of_evaluations(
    tmp_path: Path, overrides: list[str], asked: tuple[bool, bool, int, float]
) -> None:
    servers = NotingServers()
    run_to_the_end(config_of(tmp_path, *overrides[1:], replayed=overrides[0]), servers, checkpoint_every=2)
    num_evaluated = 2 * (STEPS + 1)  # prompts, at each version
    assert Counter(servers.asked) == {asked: STEPS * NUM_PROMPTS, (False, False, 0, 1.0): num_evaluated}


@pytest.mark.parametrize("crash_at", range(4, NUM_REQUESTS - 4, 5))
@pytest.mark.parametrize(
    ("mode", "every", "replayed"),
    [("delay", 2, ROUTES), ("delay", 0, ROUTES), ("bounded", 2, ROUTES), ("delay", 2, SUPPORTS)],
)
def test_a_run_that_crashes_has_the_routes_that_it_needs(
    tmp_path: Path,
    undisturbed: FakeTrainer,
    mode: str,
    every: int,
    replayed: str,
    crash_at: int,
) -> None:
    overrides = [] if every else ["checkpoint.every_steps=0"]
    config = config_of(tmp_path, *overrides, bounded=mode == "bounded", replayed=replayed)
    trainer = FakeTrainer(config, checkpoint_every=every or 99)

    async def incarnation(crash_at: int | None) -> CollectorTotals:
        servers = FakeServers(2, exact=mode == "delay")
        async with collecting(config, servers, trainer.checkpoint or 0) as collector:
            return await trainer.run(collector, crash_at)

    with pytest.raises(Crash):
        asyncio.run(incarnation(crash_at))
    check_run(config, trainer, asyncio.run(incarnation(None)))
    for batch in trainer.trained.values():
        responses = [response for group in batch.groups for response in group.responses]
        assert all((one.stored_routes if replayed == ROUTES else one.stored_supports) for one in responses)
    if mode == "delay":
        assert all(contents(trainer.trained[step]) == contents(undisturbed.trained[step]) for step in range(STEPS))
