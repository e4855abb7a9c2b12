"""parallel.ddp.overlap_grad_reduce: gradients are sent during the backward pass, and the updates are the same."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.reference import make_sequences
from tests.mesh.steps import loaded_policy, step_config
from tests.support.long_cases import long_rows_after

pytestmark = pytest.mark.mesh

UPDATES = 3
MAX_DIFFERENCE = 2e-6  # of a weight, where more than two ranks are added in another order
# A model, its mesh, and whether only two ranks are added: then the order cannot change a bit.
MESHES: list[tuple[str, dict[str, int], bool]] = [
    ("moe", {"pipeline": 2, "data": 2, "expert": 2}, True),
    ("tied", {"pipeline": 2, "virtual_pipeline": 2, "data": 2}, True),
    ("moe", {"tensor": 2, "context": 2, "data": 2, "expert": 2}, False),
]


class Trained(NamedTuple):
    """What rank 0 has after some updates."""

    grad_norms: list[float]
    weights: dict[str, np.ndarray]
    buckets: int
    sent_early: list[int]  # for each update, the buckets that were sent before the end of the backward pass


def _train(mesh: Mesh, hf_path: str, configs: list[RunConfig], sequences: list[TokenSequence]) -> list[Trained]:
    from tests.mesh.gradients import whole_tensors

    results = []
    for config in configs:
        architecture, policy = loaded_policy(mesh, config, hf_path)
        groups = [
            group for chunk in policy._chunks for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
        ]
        sent: list[int] = []
        for group in groups:
            _record(group, sent)
        norms, counts = [], []
        for _ in range(UPDATES):
            sent.clear()
            norms.append(policy.update(sequences, 1e-3).grad_norm)
            counts.append(len(set(sent)))
        results.append(Trained(norms, whole_tensors(policy, architecture, mesh), len(groups), counts))
    return results


def _record(group: Any, sent: list[int]) -> None:
    """Adds the group to `sent` when it is sent by the backward pass, and not by the call that ends all sending."""
    start, finish = group.start_grad_sync, group.finish_grad_sync
    ends: list[bool] = []

    def started(*arguments: Any, **options: Any) -> Any:
        if not ends:
            sent.append(id(group))
        return start(*arguments, **options)

    def finished(*arguments: Any, **options: Any) -> Any:
        ends.append(True)
        try:
            return finish(*arguments, **options)
        finally:
            ends.pop()

    group.start_grad_sync, group.finish_grad_sync = started, finished


@pytest.mark.parametrize(("kind", "parallel", "is_exact"), long_rows_after(1, MESHES), ids=str)
def test_updates_are_the_same(kind: str, parallel: dict[str, int], is_exact: bool, starts: dict[str, Start]) -> None:
    overlapped = parallel | {"ddp": {"overlap_grad_reduce": True, "bucket_size": 5000}}
    configs = [step_config(settings, row_tokens=128) for settings in (parallel, overlapped)]
    plain, early = run_mesh(_train, starts[kind].hf_path, configs, make_sequences(8, 30), deadline_s=150.0, **parallel)[
        0
    ]
    assert plain.sent_early == [0] * UPDATES
    # in the first update Megatron learns which gradients there are
    assert early.buckets > plain.buckets
    assert early.sent_early == [0] + [early.buckets] * (UPDATES - 1)
    if is_exact:
        assert early.grad_norms == pytest.approx(plain.grad_norms, rel=1e-6)  # summed bucket by bucket
    worst = max(float(np.abs(early.weights[name] - weight).max()) for name, weight in plain.weights.items())
    assert worst <= MAX_DIFFERENCE
