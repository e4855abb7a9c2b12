"""Runs of collector and trainer to their end, through crashes, and what every run must have done."""

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.buffer.journal_file import FILE_NAME
from minpro_megatron.config.run import RunConfig
from minpro_megatron.evaluation.sampling import FILE_NAME as EVALUATIONS
from minpro_megatron.records import CollectorTotals
from tests.support.collector_rig import Crash, FakeTrainer, collecting
from tests.support.rollout_fakes import (
    NUM_PROMPTS,
    FakeServers,
    run_config,
)

STEPS, DELAY, ETA = 4, 2, 2
NUM_REQUESTS = 28  # of a run without a crash, in either mode


def config_of(folder: Path, mode: str, **changes) -> RunConfig:
    settings: dict[str, Any] = {"at_start": True} | ({"max_staleness": ETA} if mode == "bounded" else {}) | changes
    return run_config(folder, steps=STEPS, delay=DELAY, evaluate_every=1, **settings)


def run_whole(
    config: RunConfig, crashes_at: list[int], make_servers: Callable[..., FakeServers] = FakeServers
) -> tuple[FakeTrainer, CollectorTotals]:
    """The run to its end; the n-th incarnation crashes at its request `crashes_at[n]`."""
    trainer = FakeTrainer(config)

    async def incarnation(crash_at: int | None) -> CollectorTotals:
        servers = make_servers(count=2, exact=config.staleness.mode == "delay")
        async with collecting(config, servers, trainer.checkpoint or 0) as collector:
            return await trainer.run(collector, crash_at)

    for crash_at in crashes_at:
        with pytest.raises(Crash):
            asyncio.run(incarnation(crash_at))
    return trainer, asyncio.run(incarnation(None))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> FakeTrainer:
    """What delay mode trains on without a crash."""
    trainer, _ = run_whole(config_of(tmp_path_factory.mktemp("undisturbed"), "delay"), [])
    assert trainer.num_requests == NUM_REQUESTS
    return trainer


def check_run(config: RunConfig, trainer: FakeTrainer, totals: CollectorTotals) -> None:
    """Every group once, within the bound; every evaluation once."""
    exact = config.staleness.mode == "delay"
    ids = [group.issued.group_id for step in range(STEPS) for group in trainer.trained[step].groups]
    assert max(Counter(ids).values()) == 1
    for step, batch in trainer.trained.items():
        found = {step - group.oldest_version for group in batch.groups}
        assert found == {min(step, DELAY)} if exact else found <= {*range(ETA + 1)}
    with closing(sqlite3.connect(config.run_dir / FILE_NAME)) as journal:
        rows = journal.execute("SELECT group_id, consumed_step FROM groups WHERE state = 'consumed'").fetchall()
        all_ids = [row[0] for row in journal.execute("SELECT group_id FROM groups ORDER BY group_id")]
    assert sorted(rows) == sorted((id_, place // NUM_PROMPTS) for place, id_ in enumerate(ids))
    assert all_ids == list(range(len(all_ids)))
    assert totals.groups_consumed == STEPS * NUM_PROMPTS
    assert totals.versions_published == STEPS
    assert sorted(result.policy_version for result in totals.evaluations) == list(range(STEPS + 1))
    assert len((config.run_dir / EVALUATIONS).read_text().splitlines()) == STEPS + 1
