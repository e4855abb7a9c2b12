"""A rank with a policy and its checkpoints, and a disk that gets full under it."""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minpro_megatron.checkpoints.resume_point import CHECKPOINTS, read_latest
from minpro_megatron.config.checkpoint import CheckpointConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.reference import make_model, make_sequences
from tests.mesh.steps import loaded_policy, step_config

LEARNING_RATE = 1e-3
TWO = {"tensor": 2, "expert": 2}
CONFIG = step_config(TWO, row_tokens=128)


class Rank:
    """A policy and its checkpoints on one rank, as train.py has them."""

    def __init__(self, mesh: Mesh, start: tuple[str, str, list], config: RunConfig = CONFIG, **settings: Any) -> None:
        from minpro_megatron.checkpoints.run_checkpoints import RunCheckpoints

        self.mesh = mesh
        self.hf_path, folder, self.sequences = start
        self.run_dir = Path(folder)
        self.policy = loaded_policy(mesh, config, self.hf_path)[1]
        self.checkpoints = RunCheckpoints(self.run_dir / CHECKPOINTS, CheckpointConfig(**settings), mesh)

    def update(self, count: int = 1, learning_rate: float = LEARNING_RATE) -> None:
        for _ in range(count):
            assert self.policy.update(self.sequences, learning_rate).applied

    def latest(self) -> int | None:
        return self.on_rank_0(lambda: (manifest := read_latest(self.run_dir)) and manifest.policy_version)

    def on_rank_0[T](self, look: Callable[[], T]) -> T:
        """What rank 0 sees, on all ranks: it changes the folder, and waits for nobody who still looks."""
        return self.mesh.from_rank_0(look() if self.mesh.rank == 0 else None)

    def load_latest(self) -> None:
        manifest = self.on_rank_0(lambda: read_latest(self.run_dir))
        assert manifest is not None
        self.checkpoints.load(self.policy, manifest)

    def numbers(self) -> dict[str, np.ndarray]:
        """All weights, moments and step counts of this rank, bit by bit."""
        found = {}
        for chunk in self.policy.modules:
            found |= {name: parameter.detach().numpy().copy() for name, parameter in chunk.named_parameters()}
        for index, one in enumerate(self.policy._optimizer.chained_optimizers):
            for place, parameter in enumerate(p for group in one.optimizer.param_groups for p in group["params"]):
                found[f"{index}.{place}"] = parameter.detach().numpy().copy()
                for name, value in one.optimizer.state[parameter].items():
                    found[f"{index}.{place}.{name}"] = value.numpy().copy()
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list]:
    hf_path = tmp_path_factory.mktemp("hf")
    make_model("moe").save_pretrained(hf_path)
    random = np.random.default_rng(3)
    sequences = [
        replace(one, behavior_log_probs=random.normal(-4.5, 0.7, len(one.response_ids)).astype(np.float32))
        for one in make_sequences(8, 30)
    ]
    return str(hf_path), sequences


@pytest.fixture
def start(model: tuple[str, list], tmp_path: Path) -> tuple[str, str, list]:
    hf_path, sequences = model
    return hf_path, str(tmp_path), sequences


@contextmanager
def fill_the_disk(mesh: Mesh, checkpoints: Path, before: str = "step-000010") -> Iterator[None]:
    """Rank 1 can write half of what it wrote before, then the system refuses; its writer inherits that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.rank == 1:
        half = (checkpoints / before / "__1_0.distcp").stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
