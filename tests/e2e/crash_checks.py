"""What a run of the crash tests must be: the undisturbed one by itself, a bounded one compared with it."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from minpro_megatron.buffer.journal_reader import JournalReader
from minpro_megatron.records import NOT_SAMPLED
from tests.e2e.conftest import TinyModel
from tests.e2e.crashes import (
    DELAY,
    EVERY,
    PROMPTS,
    RESPONSES,
    STEPS,
    CrashRun,
    Results,
    make_model,
)
from tests.e2e.episode_environment import EPISODES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("crash_model"))


@pytest.fixture(scope="module")
def undisturbed(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Results:
    run = CrashRun(model, tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    run.finish()
    check_undisturbed(run.run_dir, model)
    return Results.read(run.run_dir)


@pytest.fixture(scope="module")
def undisturbed_episodes(model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of the same run with an environment."""
    run = CrashRun(model, tmp_path_factory.mktemp("episodes"), "undisturbed", *EPISODES)
    run.finish()
    check_undisturbed(run.run_dir, model)
    check_episodes(run.run_dir)
    return Results.read(run.run_dir)


def check_episodes(run_dir: Path) -> None:
    """Most responses have several turns; what the environment gave has neither log-probs nor a version."""
    with JournalReader(run_dir) as reader:
        responses = [response for group in reader.groups("state = 'consumed'") for response in group.responses]
    with_given = [response for response in responses if response.loss_mask is not None]
    assert len(with_given) > len(responses) // 2
    assert {len(response.turns) for response in with_given} == {2, 3}
    for response in with_given:
        assert response.loss_mask is not None
        assert response.policy_versions is not None
        given = response.loss_mask == 0
        assert sum(turn.given_tokens for turn in response.turns) == np.count_nonzero(given)
        assert sum(turn.sampled_tokens for turn in response.turns) == np.count_nonzero(~given)
        for name in ("rollout_log_probs", "behavior_log_probs", "trained_log_probs"):
            values = getattr(response, name)
            assert np.isnan(values[given]).all(), name
            assert np.isfinite(values[~given]).all(), name
        assert (response.policy_versions[given] == NOT_SAMPLED).all()


def check_undisturbed(run_dir: Path, model: TinyModel) -> None:
    """What a run of delay mode is, apart from other runs; and that it trains: equal runs that do nothing prove
    nothing."""
    results = Results.read(run_dir)
    assert results.states == {"consumed": STEPS * PROMPTS}
    for group_id, (step, _, batch_index, issued_version, oldest_version, staleness) in results.groups.items():
        assert step == batch_index == group_id // PROMPTS
        assert issued_version == oldest_version == max(0, step - DELAY)
        assert staleness == min(step, DELAY)
    seeds = [seed for seeds in results.seeds.values() for seed in seeds]
    assert len(set(seeds)) == len(seeds) == STEPS * PROMPTS * RESPONSES
    assert [one["policy_version"] for one in results.evaluations] == list(range(0, STEPS + 1, EVERY))
    mixed = {
        results.groups[group_id][0]
        for group_id, responses in results.rollouts.items()
        if len({response[4] for response in responses}) > 1
    }
    assert len(mixed) >= STEPS // 2
    norms = [metrics["optimizer/grad_norm"] for _, is_step, metrics in results.metrics if is_step]
    assert len(norms) == STEPS
    assert min(norms) > 0


def check_bounded(run_dir: Path, undisturbed: Results) -> None:
    """Every group once, none lost, the prompts and seeds of its id, no token too old or too new."""
    results = Results.read(run_dir)
    assert results.states == {"consumed": STEPS * PROMPTS}
    assert sorted(results.groups) == sorted(undisturbed.groups)
    assert results.seeds == undisturbed.seeds
    consumed: dict[int, int] = {}
    for group_id, (step, prompt_id, _, _, oldest_version, staleness) in results.groups.items():
        consumed[step] = consumed.get(step, 0) + 1
        assert prompt_id == undisturbed.groups[group_id][1]
        assert staleness == step - oldest_version
        assert 0 <= staleness <= 2
    assert consumed == dict.fromkeys(range(STEPS), PROMPTS)
    with closing(sqlite3.connect(f"file:{run_dir / 'journal.sqlite'}?mode=ro", uri=True)) as journal:
        too_new = "SELECT count(*) FROM groups WHERE newest_version > consumed_step"
        assert journal.execute(too_new).fetchone()[0] == 0
    assert [one["policy_version"] for one in results.evaluations] == list(range(0, STEPS + 1, EVERY))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["largest_staleness"] <= 2) == (STEPS, True)
