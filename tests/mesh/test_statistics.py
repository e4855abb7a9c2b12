"""The statistics of a mini-batch are the same on every mesh: counts and buckets exactly, numbers to rounding."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.metrics.metric import Metric
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.ragged_batch import in_order
from tests.mesh.steps import loaded_policy, step_config
from tests.support.long_cases import long_after

pytestmark = pytest.mark.mesh

MESHES = [{"tensor": 2, "expert": 2, "context": 2}, {"pipeline": 2, "data": 2}]
Found = tuple[dict[str, Metric], dict[str, np.ndarray]]
# what the mesh decides: how rows are filled and shared
OF_THE_MESH = ("batch/padding_fraction", "batch/imbalance")


def _statistics(mesh: Mesh, config: RunConfig, hf_path: str, sequences: Sequence[TokenSequence]) -> Found:
    from minpro_megatron.actor.memory import rank_memory
    from minpro_megatron.metrics.histograms import merge_histograms
    from minpro_megatron.metrics.metric import merge

    _, policy = loaded_policy(mesh, config, hf_path)
    metrics, histograms, _ = policy.accumulate_gradient(sequences)
    parts = mesh.from_all_ranks((metrics | rank_memory(mesh.device), histograms))
    return merge([part for part, _ in parts]), merge_histograms([part for _, part in parts])


@pytest.fixture(scope="module")
def sequences(starts: dict[str, Start]) -> list[TokenSequence]:
    """With tokens of several versions in each response, and servers that disagree."""
    random = np.random.default_rng(7)
    return [
        replace(
            one,
            staleness=random.integers(0, 20, len(one.response_ids)).astype(np.int32),
            rollout_log_probs=(one.behavior_log_probs + random.normal(0, 0.1, len(one.response_ids))).astype(
                np.float32
            ),
        )
        for one in in_order(starts["moe"].groups)
    ]


@pytest.fixture(scope="module")
def on_one_rank(starts: dict[str, Start], sequences: list[TokenSequence]) -> Found:
    (found,) = run_mesh(_statistics, step_config({}), starts["moe"].hf_path, sequences)
    return found


@pytest.mark.parametrize("parallel", long_after(1, MESHES), ids=str)
def test_statistics_do_not_depend_on_the_mesh(
    parallel: dict[str, int], starts: dict[str, Start], sequences: list[TokenSequence], on_one_rank: Found
) -> None:
    ranks = run_mesh(_statistics, step_config(parallel), starts["moe"].hf_path, sequences, **parallel)
    assert all(metrics.keys() == ranks[0][0].keys() for metrics, _ in ranks)
    metrics, histograms = ranks[0]
    expected, expected_histograms = on_one_rank
    assert metrics.keys() == expected.keys()
    assert sum("_by_position/" in name for name in metrics) == 6 * 8  # up to 168 trained tokens in a response
    assert sum("_by_staleness/" in name for name in metrics) == 6 * 17
    assert metrics["memory/host_bytes/train"].count == len(ranks)
    trained = expected["ratio/mean"].count
    for name, one in expected.items():
        if name.startswith("memory/") or name in OF_THE_MESH:
            continue
        assert metrics[name].reduction == one.reduction, name
        if one.reduction == "mean":  # an extreme's count says how many parts it is of
            assert metrics[name].count == one.count, name
        assert metrics[name].value == pytest.approx(one.value, rel=2e-4, abs=2e-5), name
    for name, counts in expected_histograms.items():
        assert histograms[name].sum() == counts.sum() == trained
        # a number at the edge of a bin falls to either side
        assert np.abs(np.cumsum(histograms[name]) - np.cumsum(counts)).max() <= 5, name
