"""The process groups' own time limits: none is shorter than the run's, debug.hang_timeout_s."""

from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import pytest

from minpro_megatron.config.debug import DebugConfig
from minpro_megatron.config.parallel import ParallelConfig
from minpro_megatron.errors import RunFailed
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.support.run_examples import example_config

pytestmark = pytest.mark.mesh


def _limits(mesh: Mesh) -> dict[str, timedelta]:
    """Of every process group of this rank, by its description."""
    import torch
    from torch.distributed import distributed_c10d

    found = {}
    for group in distributed_c10d._world.pg_map:
        name = f"{group.group_desc} {group.group_name}"
        found[name] = group._get_backend(torch.device("cpu")).options._timeout
    return found


@pytest.mark.parametrize(("hang_timeout_s", "expected"), [(0.0, 1800), (7200.5, 7380)])
def test_no_process_group_gives_up_before_the_watchdog(hang_timeout_s: float, expected: float) -> None:
    ranks = run_mesh(_limits, hang_timeout_s=hang_timeout_s, tensor=2, expert=2)
    for limits in ranks:
        assert len(limits) > 15, "megatron's groups are among them"
        control = [limit for limit in limits.values() if limit == timedelta(days=30)]
        assert len(control) == 1
        others = {name: limit for name, limit in limits.items() if limit != timedelta(days=30)}
        assert set(others.values()) == {timedelta(seconds=expected)}, others


def test_a_trainer_gives_its_groups_the_runs_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minpro_megatron.roles import train

    asked: dict[str, Any] = {}

    def open_mesh(parallel: ParallelConfig, device: str, seed: int, **options: Any) -> NoReturn:
        asked.update(options)
        raise RunFailed("enough")

    monkeypatch.setattr(train, "open_mesh", open_mesh)
    config = example_config(tmp_path, debug=DebugConfig(hang_timeout_s=5400))
    assert train.run(config, incarnation=0) == 1
    assert asked == {"hang_timeout_s": 5400}
