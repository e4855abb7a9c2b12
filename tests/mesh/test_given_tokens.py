"""Given tokens inside responses: whatever stands at their places, no bit of an update depends on it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.loss import DecoupledConfig, IcePopConfig, KlConfig, LossConfig, TruncatedImportanceConfig
from minpro_megatron.config.run import RunConfig
from minpro_megatron.objective.registry import OBJECTIVES
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.ragged_batch import SHORTEST_ROW
from tests.mesh.reference import minpro_loss, reference_step
from tests.mesh.steps import LEARNING_RATE, TEMPERATURE, differences, step_config, take_steps
from tests.support.long_cases import long_rows_after

pytestmark = [pytest.mark.mesh, pytest.mark.timeout(1200)]

ALL_CORRECTIONS = LossConfig(
    truncated_importance=TruncatedImportanceConfig(enabled=True),
    icepop=IcePopConfig(enabled=True, low=0.2),
    decoupled=DecoupledConfig(enabled=True),
    kl=KlConfig(enabled=True, coefficient=0.1),
)
HARDEST = {"tensor": 2, "context": 2, "pipeline": 2, "expert": 2}
# their sums and minima over a sequence differ most
FIRST = ["minpro", "ctpo", "gspo"]
ALL = list(OBJECTIVES)
MESHES = [
    ("tied", {"tensor": 2, "context": 2}, FIRST),
    ("tied", {"tensor": 2, "context": 2}, [name for name in ALL if name not in FIRST]),
    ("moe", HARDEST, ["minpro", "ctpo", "gspo", "m2po"]),
    ("dense", {"context": 3, "data": 2}, ALL),
    ("moe", {"pipeline": 2, "virtual_pipeline": 2, "data": 2, "expert": 2}, ALL),
]


def episodes(groups: Sequence[Sequence[TokenSequence]]) -> list[TokenSequence]:
    """The responses as episodes: after every seventh to thirty-fifth token up to 60 tokens are given."""
    random, made = np.random.default_rng(11), []
    for sequence in (one for group in groups for one in group):
        mask, place = np.ones(len(sequence.response_ids), np.float32), 0
        while place < len(mask):
            first = place + int(random.integers(7, 36))
            place = first + int(random.integers(1, 61))
            mask[first:place] = 0
        mask[-1] = 1
        near = random.normal(-4.4, 0.7, (3, len(mask))).astype(np.float32)
        made.append(
            replace(
                sequence,
                loss_mask=mask,
                behavior_log_probs=near[0],
                rollout_log_probs=near[0] + random.normal(0, 0.3, len(mask)).astype(np.float32),
                proximal_log_probs=near[1],
                reference_log_probs=near[2],
                staleness=random.integers(0, 4, len(mask)),
            )
        )
    return made


def filled(sequences: Sequence[TokenSequence], number: float, staleness: int) -> list[TokenSequence]:
    """The sequences with these values at given tokens."""

    def fill(sequence: TokenSequence, name: str, value: float) -> np.ndarray:
        found = np.asarray(getattr(sequence, name))
        return np.where(sequence.loss_mask > 0, found, np.asarray(value, found.dtype))

    numbers = ("behavior_log_probs", "rollout_log_probs", "proximal_log_probs", "reference_log_probs")
    return [
        replace(one, staleness=fill(one, "staleness", staleness), **{name: fill(one, name, number) for name in numbers})
        for one in sequences
    ]


def config_of(parallel: dict[str, int], name: str, loss: LossConfig) -> RunConfig:
    config = step_config(parallel, row_tokens=2 * SHORTEST_ROW, name=name)
    return config.model_copy(update={"loss": loss})


@pytest.mark.parametrize(("kind", "parallel", "names"), long_rows_after(1, MESHES), ids=str)
def test_values_at_given_tokens_change_no_bit(
    kind: str, parallel: dict[str, int], names: list[str], starts: dict[str, Start]
) -> None:
    """Of loss, gradient norm, gradients and updated weights, with every correction on."""
    sequences = episodes(starts[kind].groups)
    configs = [config_of(parallel, name, ALL_CORRECTIONS) for name in names]
    fills = [filled(sequences, 0.0, 0), filled(sequences, float("nan"), -10_000)]
    if names != FIRST:
        fills.append(filled(sequences, 3e38, 2**40))
    layouts = [(config, fill) for config in configs for fill in fills]
    steps = run_mesh(take_steps, starts[kind].hf_path, layouts, deadline_s=1100, **parallel)[0]
    for place, config in enumerate(configs):
        plain, *others = steps[len(fills) * place : len(fills) * (place + 1)]
        assert np.isfinite(plain.loss)
        for other in others:
            assert (other.loss, other.grad_norms) == (plain.loss, plain.grad_norms), config.objective.name
            for mine, its in ((plain.gradients, other.gradients), (plain.weights, other.weights)):
                for tensor, values in mine.items():
                    np.testing.assert_array_equal(its[tensor], values, err_msg=f"{config.objective.name}: {tensor}")


@pytest.mark.parametrize(
    ("kind", "parallel"), long_rows_after(1, [("moe", HARDEST), ("dense", {"context": 3, "data": 2})]), ids=str
)
def test_a_step_on_episodes_equals_transformers(kind: str, parallel: dict[str, int], starts: dict[str, Start]) -> None:
    """The reference is a loop over tokens that leaves the given ones out; the mesh finds NaN at their places."""
    start, plain = starts[kind], filled(episodes(starts[kind].groups), 0.0, 0)
    config = config_of(parallel, "minpro", LossConfig())
    expected = reference_step(
        start.model, plain, minpro_loss("token_mean"), TEMPERATURE, LEARNING_RATE, config.optimizer
    )
    layouts = [(config, filled(plain, float("nan"), -1))]
    (step,) = run_mesh(take_steps, start.hf_path, layouts, **parallel)[0]
    assert differences(step, expected).breaches == []
