"""Settings of this tier's own process (the ranks set theirs in harness.py), and what several files start from."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.mesh.ragged_batch import Groups, in_order, ragged_groups, smallest_routing_gap
from tests.mesh.reference import PreTrainedModel, make_model
from tests.mesh.steps import TEMPERATURE

torch.set_num_threads(1)  # the references are tiny: more threads only wait for each other


class Start(NamedTuple):
    """A model, its files, and a mini-batch for it."""

    model: PreTrainedModel
    hf_path: str
    groups: Groups


class Starts(dict[str, Start]):
    """One for each kind of model that `reference.make_model` knows, made when it is asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        super().__init__()
        self._factory = factory

    def __missing__(self, kind: str) -> Start:
        model = make_model(kind)
        path: Path = self._factory.mktemp(kind)
        model.save_pretrained(path)
        start = self[kind] = Start(model, str(path), ragged_groups(model, TEMPERATURE))
        if kind == "moe":  # float32 logits are right to about 1e-6
            assert smallest_routing_gap(model, in_order(start.groups)) > 5e-5, "take another seed for the batch"
        return start


@pytest.fixture(scope="session")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Starts:
    return Starts(tmp_path_factory)
