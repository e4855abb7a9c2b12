"""A rank that fails says so to torchrun and to the supervisor, and its traceback is in the log."""

import json
import logging
import os
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest

from minpro_megatron.errors import FAILED, RunFailed
from minpro_megatron.monitor.rank_failures import FOLDER_VARIABLE, first_rank_failure
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.harness import run_mesh
from tests.support.rollout_fakes import run_config

pytestmark = pytest.mark.mesh


def fail(mesh: Mesh, folder: str, expected: bool) -> tuple[int, str]:
    """The exit status and the log of the role `train`, whose rank 1 raises an error while rank 0 waits for it."""
    from minpro_megatron.roles import train

    os.environ |= {
        "RANK": str(mesh.rank),
        FOLDER_VARIABLE: folder,
        "TORCHELASTIC_ERROR_FILE": f"{folder}/torch-{mesh.rank}.json",
    }
    log = StringIO()
    logging.getLogger().addHandler(logging.StreamHandler(log))

    @contextmanager
    def opened(*_: object, **__: object):
        yield mesh

    def work(*_: object) -> None:
        if mesh.rank == 1:
            raise RunFailed("not finite") if expected else TypeError("rank 1's mistake")
        raise RuntimeError("Connection closed by peer")

    train.open_mesh, train._train = opened, work
    return train.run(run_config(Path(folder)), 0), log.getvalue()


@pytest.mark.parametrize("expected", [True, False])
def test_the_first_rank_that_failed_is_known(tmp_path: Path, expected: bool) -> None:
    (first, other), (second, log) = run_mesh(fail, str(tmp_path), expected, tensor=2)
    assert (first, second) == (FAILED, FAILED)
    failure = first_rank_failure(tmp_path)
    assert failure is not None
    assert failure.rank == 1
    assert "train, rank 0: unexpected error" in other
    assert bool(failure.traceback) == (not expected)
    assert ("train, rank 1: unexpected error\nTraceback (most recent call last)" in log) == (not expected)
    torchs = json.loads((tmp_path / "torch-1.json").read_text())["message"]
    assert torchs["message"] == ("RunFailed: not finite" if expected else "TypeError: rank 1's mistake")
