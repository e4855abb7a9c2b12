"""A start that ends early: all ranks end together, with a checkpoint, also where its first attempt fails."""

from pathlib import Path
from typing import Any

import pytest

from minpro_megatron.checkpoints.manifest import TrainerState
from minpro_megatron.config.run import with_overrides
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.checkpointing_rank import CONFIG, TWO, Rank, fill_the_disk, model, start
from tests.mesh.harness import run_mesh

pytestmark = pytest.mark.mesh
__all__ = ["model", "start"]  # fixtures


def _train(mesh: Mesh, start: tuple, every: int, stop_at: int | None, failing: int | None) -> dict[str, Any]:
    """A run of four global steps that change nothing; it saves after each `every`-th. Rank 0 is asked to stop after
    step `stop_at`. The first save of version `failing` finds no room on rank 1."""
    from minpro_megatron.checkpoints.save_schedule import EndedEarly, SaveSchedule
    from minpro_megatron.checkpoints.saving import Saving
    from minpro_megatron.monitor.phases import PhaseClock
    from minpro_megatron.monitor.watchdog import Watchdog

    config = with_overrides(
        CONFIG, ["num_global_steps=4", f"checkpoint.every_steps={every}", "staleness.delay_steps=0"]
    )
    rank = Rank(mesh, start, asynchronous=False)
    tried: list[int] = []

    class FullDisk:
        """The policy, whose first save of version `failing` finds no room on rank 1."""

        identity = rank.policy.identity

        def load(self, folder: Path) -> int:
            return rank.policy.load(folder)

        def save(self, folder: Path, in_background: bool = False) -> Any:
            if version != failing or tried:
                return rank.policy.save(folder, in_background)
            tried.append(version)
            with fill_the_disk(mesh, rank.run_dir / "checkpoints", f"step-{version - 1:06d}"):
                return rank.policy.save(folder, in_background)

    watchdog = Watchdog(Path(start[1], f"stacks-{mesh.rank}"), 600)
    saving = Saving(config, mesh, FullDisk(), rank.checkpoints, PhaseClock(("checkpoint",), watchdog=watchdog))
    said: list[tuple[int, str]] = []
    if mesh.rank == 0:
        requests = iter([None] * (stop_at - 1) + ["asked to stop"] if stop_at else [None] * 4)
        schedule = SaveSchedule(config, stop_request=lambda: next(requests))
        saving.decide_with(schedule, lambda version, reason: said.append((version, reason)))
    ended = None
    try:
        saving.begin()
        for version in range(1, 5):
            saving.after_step(TrainerState(policy_version=version, updates=0, skipped_updates=0), alarms=[])
    except EndedEarly as end:
        ended = (end.version, end.reason)
    finally:
        watchdog.close()
    return {"ended": ended, "latest": rank.latest(), "said": said, "tried": tried}


def test_a_request_to_rank_0_ends_all_ranks_with_a_checkpoint(start: tuple) -> None:
    """Its first attempt fails."""
    found = run_mesh(_train, start, 1, 2, 2, **TWO)
    assert [one["ended"] for one in found] == [(2, "asked to stop")] * 2
    assert [one["latest"] for one in found] == [2, 2]
    assert [one["said"] for one in found] == [[(2, "asked to stop")], []]
    assert found[0]["tried"] == [2]


@pytest.mark.parametrize("failing", [None, pytest.param(4, marks=pytest.mark.long)])
def test_the_end_of_a_run_leaves_a_checkpoint(start: tuple, failing: int | None) -> None:
    found = run_mesh(_train, start, 3, None, failing, **TWO)
    assert [one["ended"] for one in found] == [None, None]
    assert [one["latest"] for one in found] == [4, 4]
