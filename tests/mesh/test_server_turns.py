"""Memory of GPUs that trainer and servers share is given back when all ranks have freed it."""

import time
from pathlib import Path

from minpro_megatron.parallel.mesh import Mesh
from minpro_megatron.publishing.turns import ServerTurns
from recipes.demo import tiny_moe
from tests.mesh.harness import run_mesh


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
