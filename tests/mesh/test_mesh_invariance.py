"""One update on any mesh, in any rows and any order, equals transformers + autograd + torch AdamW in one process.

Here meshes in which every pair of choices occurs (`make test` takes the first of them, which hold most pairs,
`make test-long` the others); matrix.py tries all meshes (`make test-matrix`).
"""

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch

from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.parallel.mesh import Mesh
from tests.mesh.conftest import Start
from tests.mesh.harness import run_mesh
from tests.mesh.meshes import Case, Degrees, all_cases, pairwise_cover
from tests.mesh.ragged_batch import SHORTEST_ROW, in_order, shuffled
from tests.mesh.reference import (
    BatchLoss,
    ReferenceStep,
    in_float64,
    minpro_loss,
    model_architecture,
    reference_step,
    response_log_probs,
)
from tests.mesh.steps import (
    LEARNING_RATE,
    MAX_REORDERED,
    SURVEY_SEED,
    TEMPERATURE,
    LaidOut,
    MeshStep,
    differences,
    loaded_policy,
    step_config,
    take_steps,
)
from tests.mesh.whole_sequences import objective_loss, tokens_of
from tests.support.long_cases import long_after, long_rows_after

pytestmark = pytest.mark.mesh

# Packed rows x zig-zag context x sequence parallelism, with pipeline and expert ranks: what breaks first.
HARDEST = Case("moe", Degrees(tensor=2, pipeline=2, expert=2, context=2), packing=True)
COVER = pairwise_cover(all_cases({kind: model_architecture(kind) for kind in ("moe", "dense")}), first=HARDEST)
# Their terms of a token and sums over a sequence are those of other objectives; test_surveys.py also compares the
# surveys on shards.
SIMILAR = [
    "cispo", "prefix_ratio", "ctpo_geomean", "dppo", "sapo", "pnpo", "sat", "m2po_winsorized", "prefix_filter",
    "scaled_cispo",
]  # fmt: skip
SURVEYING = [name for name, objective in OBJECTIVES.items() if objective.survey is not None]
# What the factorisations leave out: tied embeddings, which two pipeline stages share, virtual stages, cut experts.
SPECIAL = [
    ("tied", {"pipeline": 2, "context": 2, "data": 2}, True),
    ("moe", {"pipeline": 2, "virtual_pipeline": 2, "context": 2, "expert": 2}, True),
    ("moe", {"tensor": 2, "expert_tensor": 2, "data": 2, "expert": 2}, True),
    ("tied", {"pipeline": 2, "virtual_pipeline": 2, "tensor": 2}, False),
]


def expected_step(start: Start, loss: BatchLoss, learning_rate: float = LEARNING_RATE) -> ReferenceStep:
    optimizer = step_config({}).optimizer
    return reference_step(start.model, in_order(start.groups), loss, TEMPERATURE, learning_rate, optimizer)


@pytest.fixture(scope="module")
def minpro_steps(starts: dict[str, Start]) -> dict[str, ReferenceStep]:
    return {kind: expected_step(starts[kind], minpro_loss("token_mean")) for kind in ("moe", "dense", "tied")}


@pytest.mark.parametrize("case", long_after(3, COVER), ids=str)
def test_step_equals_transformers(case: Case, starts: dict, minpro_steps: dict) -> None:
    start, place = starts[case.model], COVER.index(case)
    row_tokens = SHORTEST_ROW * (1 + place % 3)
    config = step_config(case.degrees.as_settings, packing=case.packing, row_tokens=row_tokens)
    (step,) = on_rank_0(start, [(config, shuffled(start.groups, seed=place))])
    assert differences(step, minpro_steps[case.model]).breaches == []


@pytest.mark.parametrize(("kind", "parallel", "packing"), long_rows_after(3, SPECIAL), ids=str)
def test_step_of_special_meshes_equals_transformers(
    kind: str, parallel: dict[str, int], packing: bool, starts: dict, minpro_steps: dict
) -> None:
    (step,) = on_rank_0(starts[kind], [(step_config(parallel, packing=packing), in_order(starts[kind].groups))])
    assert differences(step, minpro_steps[kind]).breaches == []


def on_rank_0(start: Start, layouts: Sequence[LaidOut]) -> list[MeshStep]:
    """One update with each layout, all of them of the same mesh."""
    return run_mesh(take_steps, start.hf_path, layouts, **layouts[0][0].parallel.model_dump())[0]


def test_rows_and_order_change_nothing(starts: dict, minpro_steps: dict) -> None:
    """From a row a sequence to all sequences in one row, and groups in any order."""
    start, parallel = starts["dense"], {"pipeline": 2, "data": 2}
    rows = [(False, SHORTEST_ROW), (True, SHORTEST_ROW), (True, 777), (True, 5000)]
    layouts = [
        (step_config(parallel, packing=packing, row_tokens=row_tokens), shuffled(start.groups, seed))
        for seed, (packing, row_tokens) in enumerate(rows)
    ]
    steps = on_rank_0(start, layouts)
    for step in steps:
        assert step.loss == pytest.approx(steps[0].loss, rel=MAX_REORDERED)
        assert differences(step, minpro_steps["dense"]).breaches == []


@pytest.mark.parametrize(
    ("kind", "parallel"),
    long_rows_after(1, [("dense", {"context": 2}), ("moe", {"tensor": 2, "context": 2, "expert": 2})]),
    ids=str,
)
def test_sequences_of_padding_change_nothing(
    kind: str, parallel: dict[str, int], starts: dict, minpro_steps: dict
) -> None:
    """The rows that Transformer Engine's layers get (row_lengths.padding_sequences), with torch's layers."""
    config = step_config(parallel, row_tokens=5 * SHORTEST_ROW)
    layout = (config, in_order(starts[kind].groups))
    degrees = config.parallel.model_dump()
    (without, twelve), (with_them, sixteen) = run_mesh(both_kinds_of_rows, starts[kind].hf_path, layout, **degrees)[0]
    assert (twelve, sixteen) == ([12], [16])  # sequences in each row
    assert with_them.loss == pytest.approx(without.loss, rel=MAX_REORDERED)
    assert differences(with_them, minpro_steps[kind]).breaches == []


def both_kinds_of_rows(mesh: Mesh, hf_path: str, layout: LaidOut) -> list[tuple[MeshStep, list[int]]]:
    """The step and the number of sequences in each row, without and with sequences of padding."""
    from minpro_megatron.actor.backends.torch_backend import TorchAttention

    found, (config, sequences) = [], layout
    for pads in (False, True):
        with patch.object(TorchAttention, "has_graph_for_each_count", pads, create=True):
            (step,) = take_steps(mesh, hf_path, [layout])
            micro_batches, _ = loaded_policy(mesh, config, hf_path)[1]._micro_batches(sequences)
        found.append((step, [len(one.row.padded_lengths) for one in micro_batches]))
    return found


@pytest.mark.parametrize(
    ("kind", "parallel", "names"),
    [
        ("tied", {"tensor": 2, "context": 2}, [name for name in OBJECTIVES if name not in SIMILAR]),
        pytest.param("tied", {"tensor": 2, "context": 2}, SIMILAR, marks=pytest.mark.long),
        # the last stage alone computes the loss; the sums over a sequence still run over its context ranks
        pytest.param("dense", {"pipeline": 2, "context": 2}, ["cppo", "vespo"], marks=pytest.mark.long),
        pytest.param("moe", {"pipeline": 2, "context": 2, "expert": 2}, list(OBJECTIVES), marks=pytest.mark.long),
        pytest.param("moe", {"pipeline": 2, "tensor": 2, "expert": 2}, list(OBJECTIVES), marks=pytest.mark.long),
        # those that look at the whole mini-batch first, over all ranks that hold tokens
        pytest.param("moe", {"pipeline": 2, "data": 2, "expert": 2}, SURVEYING, marks=pytest.mark.long),
    ],
    ids=[
        "tensor x context",
        "tensor x context, similar",
        "pipeline x context",
        "pipeline x context, all",
        "pipeline x tensor, all",
        "pipeline x data",
    ],
)
def test_every_objective_equals_itself_over_whole_sequences(
    kind: str, parallel: dict[str, int], names: list[str], starts: dict
) -> None:
    start = starts[kind]
    configs = [step_config(parallel, row_tokens=2 * SHORTEST_ROW, name=name) for name in names]
    steps = on_rank_0(start, [(config, shuffled(start.groups, seed=2)) for config in configs])
    for config, step in zip(configs, steps, strict=True):
        settings = config.objective
        loss = objective_loss(OBJECTIVES[settings.name], settings, SURVEY_SEED)
        learning_rate = LEARNING_RATE
        if OBJECTIVES[settings.name].learning_rate_factor == "prefix_min/mean":
            learning_rate *= mean_prefix_minimum(start)
        assert differences(step, expected_step(start, loss, learning_rate)).breaches == [], settings.name


def mean_prefix_minimum(start: Start) -> float:
    sequences = in_order(start.groups)
    with in_float64(start.model) as model, torch.no_grad():
        tokens = tokens_of(sequences, [response_log_probs(model, one, TEMPERATURE) for one in sequences])
    return float(tokens.prefix_minimum_L[tokens.is_trained_L].mean())


@pytest.mark.parametrize("parallel", long_after(1, [{"tensor": 2, "context": 2}, {"context": 3, "data": 2}]), ids=str)
def test_mean_over_sequences_equals_transformers(parallel: dict[str, int], starts: dict) -> None:
    """A sequence counts once, on the rank that holds its first trained token, which need not be its first token."""
    start = starts["dense"]
    (step,) = on_rank_0(start, [(step_config(parallel, aggregation="sequence_mean"), in_order(start.groups))])
    assert differences(step, expected_step(start, minpro_loss("sequence_mean"))).breaches == []
