"""The stability study: batched sampling against the reference engine, stored curves, and the report's arithmetic."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.stability_study.analysis import (
    collapse,
    collapse_version,
    final_accuracy,
    mean_curve,
    mean_over_seeds,
    paired,
    peak_accuracy,
)
from benchmarks.stability_study.batched_model import BatchedModel
from benchmarks.stability_study.curves import (
    COLUMNS,
    RESPONSES,
    StoredRun,
    append_responses,
    read_run,
    read_stored,
    responses_digest,
    write_stored,
)
from benchmarks.stability_study.figures import hard_clipped, running_mean
from benchmarks.stability_study.grid import (
    DELAYS,
    OBJECTIVES,
    SWEEP_SEED,
    RunKey,
    choose_rate,
    study_keys,
    sweep_keys,
    sweep_table,
)
from benchmarks.stability_study.report import BEGIN, END, mean_accuracy, tables, with_tables
from benchmarks.stability_study.work import stored, stored_path
from minpro_megatron.monitor.history import Entry, encode_entry
from minpro_megatron.objective.registry import OBJECTIVES as REGISTERED
from minpro_megatron.reference_engine.model import KeyValueCache
from minpro_megatron.reference_engine.sampling import Sampler, SamplingParameters
from tests.support.reference_models import architecture, one_thread, random_model, random_tensors
from tests.support.study_runs import KEY, made_run

STOPS, MAX_RESPONSE = (7, 17, 27), 12


@torch.inference_mode()
def one_by_one(model_seed: int, prompt: list[int], seed: int, temperature: float) -> tuple[list[int], list[float], str]:
    """Tokens, log-probs and finish reason as the reference engine gives them."""
    model, cache = random_model(model_seed), KeyValueCache(architecture(), 40)
    sampler = Sampler(SamplingParameters(temperature=temperature, sampling_seed=seed))
    for token in prompt[:-1]:
        model.step(token, cache)
    tokens, log_probs = [prompt[-1]], []
    while len(log_probs) < MAX_RESPONSE:
        token, log_prob = sampler(model.logits(model.step(tokens[-1], cache)))
        tokens.append(token)
        log_probs.append(log_prob)
        if token in STOPS and len(log_probs) < MAX_RESPONSE:
            return tokens[1:], log_probs, "stop"
    return tokens[1:], log_probs, "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_batched_sampling_gives_the_reference_engines_tokens(temperature: float) -> None:
    # a stop token in a prompt stops nothing; the short prompts' responses are over before the long one's
    prompts = [*[[5, 6, 7]] * 8, [8, 9, 10, 11, 17, 12, 13, 14], [12, 13, 14, 16]]
    seeds = list(range(7, 17))
    with one_thread():
        batched = BatchedModel(random_model(0), 40)
        batched.load(random_tensors(1))
        found = batched.sample(prompts, seeds, temperature, MAX_RESPONSE, STOPS)
        expected = [one_by_one(1, prompt, seed, temperature) for prompt, seed in zip(prompts, seeds, strict=True)]
    for one, (tokens, log_probs, reason) in zip(found, expected, strict=True):
        assert one.token_ids.tolist() == tokens
        assert np.abs(one.log_probs - np.array(log_probs)).max() < 2e-5
        assert one.finish_reason == reason
    assert {reason for _, _, reason in expected} == {"stop", "length"}


def test_more_sequences_than_fit_are_sampled_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seeds = [[5, 6]] * 5, [1, 2, 3, 4, 5]
    with one_thread():
        model = BatchedModel(random_model(1), 40)
        whole = model.sample(prompts, seeds, 1.0, 6, STOPS)
        monkeypatch.setattr("benchmarks.stability_study.batched_model.MAX_SEQUENCES", 2)
        parts = model.sample(prompts, seeds, 1.0, 6, STOPS)
    assert [one.token_ids.tolist() for one in parts] == [one.token_ids.tolist() for one in whole]
    assert len({tuple(one.token_ids) for one in whole}) > 1


def test_a_dense_model_is_refused() -> None:
    from minpro_megatron.reference_engine.model import Model

    with pytest.raises(ValueError, match="a dense model"):
        BatchedModel(Model(architecture(num_experts=0), 8), 8)


def test_every_run_of_the_grid_has_its_own_name_and_the_same_seeds() -> None:
    keys = study_keys(5e-4, seeds=[0, 1])
    assert len({key.name for key in keys}) == len(keys) == len(OBJECTIVES) * len(DELAYS) * 2
    assert set(OBJECTIVES) <= REGISTERED.keys()
    assert [key.seed for key in keys[: len(keys) // 2]] == [0] * (len(keys) // 2)  # whole seeds first
    assert SWEEP_SEED not in {key.seed for key in study_keys(5e-4)}
    config = RunKey("ctpo", 8, 3, 2e-4).config("runs", "num_global_steps=9")
    assert (config.objective.name, config.staleness.delay_steps, config.seed) == ("ctpo", 8, 3)
    assert (config.optimizer.learning_rate, config.num_global_steps) == (2e-4, 9)


def test_the_rate_is_the_largest_that_learns_on_policy_and_is_hurt_by_staleness() -> None:
    assert choose_rate({1: (0.90, 0.70), 2: (0.93, 0.82), 4: (0.88, 0.60), 8: (0.87, 0.1)}) == 4
    # nowhere does staleness cost enough: where it costs most among those that learn
    assert choose_rate({1: (0.90, 0.88), 2: (0.93, 0.85), 4: (0.92, 0.89), 8: (0.5, 0.1)}) == 2
    final = {key: 0.5 + 0.1 * (key.objective == "grpo") - 0.01 * key.delay_steps for key in sweep_keys()}
    for rate, row in sweep_table(final).items():
        assert row == (pytest.approx(0.55), pytest.approx(0.47)), rate


def test_stored_curves_come_back(tmp_path: Path) -> None:
    run, path = made_run(), tmp_path / "run.jsonl"
    write_stored(path, run)
    again = read_stored(path)
    assert math.isnan(again.columns["loss"][1])
    again.columns["loss"][1] = run.columns["loss"][1] = 0.0  # NaN is unlike itself
    assert again == run
    path.write_text(path.read_text().replace('"format":1', '"format":0'))
    with pytest.raises(ValueError, match="format = 0 instead of 1"):
        read_stored(path)


def test_a_run_folder_becomes_curves(tmp_path: Path) -> None:
    metrics = dict.fromkeys(COLUMNS.values(), 1 / 3)
    lines = [encode_entry(Entry(step, 0.0, metrics | {"reward/accuracy": step / 10})) for step in range(3)]
    lines.insert(1, encode_entry(Entry(0, 0.0, {"eval/pass_at_1": 0.5})))
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    (tmp_path / "evaluations.jsonl").write_text(
        '{"policy_version": 0, "pass_at_1": 0.123456789, "standard_error": 0}\n'
    )
    for step in range(3):
        append_responses(tmp_path, step, [np.array([step, 1], np.int32)])
    run = read_run(tmp_path, KEY, "ab12", 3, None)
    assert run.columns["accuracy"] == [0.0, 0.1, 0.2]
    assert run.columns["entropy"] == [0.33333] * 3
    assert (run.versions, run.heldout) == ([0], [0.12346])
    assert len(set(run.responses)) == len((tmp_path / RESPONSES).read_text().splitlines()) == 3


def test_digests_tell_responses_apart() -> None:
    one = responses_digest([np.array([1, 2], np.int32), np.array([3], np.int32)])
    assert one == responses_digest([np.array([1, 2], np.int64), np.array([3], np.int64)])
    assert one != responses_digest([np.array([1], np.int32), np.array([2, 3], np.int32)])


def test_curves_of_other_inputs_are_not_mixed(tmp_path: Path) -> None:
    keys = [replace(KEY, seed=seed) for seed in (0, 1, 2)]
    for key, inputs in zip(keys, ("aa", "bb"), strict=False):
        write_stored(stored_path(tmp_path, key), replace(made_run(key), inputs=inputs))
    assert stored(tmp_path, keys[:1], "aa").keys() == {keys[0]}
    with pytest.raises(ValueError, match="fingerprint bb, others aa"):
        stored(tmp_path, keys)
    with pytest.raises(ValueError, match="fingerprint aa, others cc"):
        stored(tmp_path, keys, "cc")


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.2, 0.6, 0.9, 0.8, 0.7], None),
        ([0.2, 0.8, 0.3, 0.5, 0.6], None),  # a dip that recovers
        ([0.2, 0.8, 0.3, 0.5, 0.39], 40),
        ([0.2, 0.8, 0.39, 0.3, 0.1], 20),
        ([0.2, 0.05, 0.0, 0.0, 0.0], 10),  # it never learnt
        ([0.2], None),
    ],
)
def test_collapse_is_a_fall_below_half_of_the_peak_that_stays(accuracies: list[float], expected: int | None) -> None:
    assert collapse_version(list(range(0, 10 * len(accuracies), 10)), accuracies) == expected


def test_final_and_peak_accuracy() -> None:
    run = made_run(heldout=(0.2, 0.9, 0.6, 0.3, 0.3))
    assert final_accuracy(run) == pytest.approx(0.4)
    assert peak_accuracy(run) == 0.9
    assert mean_accuracy(run) == pytest.approx(0.46)
    assert collapse(run) == 6
    given_up = replace(made_run(heldout=(0.2, 0.9)), given_up="not finite", num_steps=8)
    assert final_accuracy(given_up) == 0.0
    assert mean_accuracy(given_up) == pytest.approx(1.1 / 5)  # of versions 0, 2, 4, 6, 8
    assert collapse(given_up) == len(given_up)


def test_differences_are_taken_seed_by_seed() -> None:
    ours, theirs = {0: 0.5, 1: 0.7, 2: 0.9, 9: 0.0}, {2: 0.7, 1: 0.6, 0: 0.5, 8: 1.0}
    mean = paired(ours, theirs)
    assert mean.value == pytest.approx(0.1)
    assert mean.error == pytest.approx(0.1 / math.sqrt(3))
    assert mean.half_width == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-4)  # t, 2 degrees of freedom
    assert not mean.excludes_zero
    assert paired({0: 0.5, 1: 0.61, 2: 0.7}, {0: 0.3, 1: 0.4, 2: 0.5}).excludes_zero
    assert not mean_over_seeds([0.4]).excludes_zero
    with pytest.raises(ValueError, match="no seed in common"):
        paired({0: 1.0}, {1: 1.0})


def test_mean_curves_go_as_far_as_any_run_does() -> None:
    long, short = made_run(steps=6), made_run(steps=2)
    short.columns["accuracy"][:] = [1.0, math.nan]
    assert mean_curve([long, short], "accuracy")[:3] == [0.5, 0.125, 0.25]
    assert hard_clipped([long]) == [0.25 * step for step in range(6)]
    assert running_mean([1.0, math.nan, 5.0], 3) == [1.0, 3.0, 5.0]


def runs_of_two_seeds() -> list[StoredRun]:
    """MinPRO ends 0.1 (seed 0) or 0.3 (seed 1) above everything else; with delay 8 everything else collapses."""
    runs = []
    for key in study_keys(5e-4, seeds=[0, 1]):
        end = 0.7 if key.objective == "minpro" else 0.6 - 0.2 * key.seed
        end = 0.1 if key.objective != "minpro" and key.delay_steps == 8 else end
        runs.append(made_run(key, heldout=(0.2, 0.9, end, end, end)))
    return runs


def test_the_tables_say_what_the_curves_do() -> None:
    accuracies, collapses, differences, *_ = tables(runs_of_two_seeds())
    assert "60 runs, 2 seeds" in accuracies
    assert re.search(r"`minpro` \| 0.700 ± 0.000 .* 0.900 ± 0.000 \|\n", accuracies)
    assert "`grpo` | 0.500 ± 0.100 | 0.500 ± 0.100 | 0.100 ± 0.000 |" in accuracies
    assert "`minpro` | 0 of 2 | 0 of 2 | 0 of 2 |" in collapses
    assert "`grpo` | 1 of 2: 4 | 1 of 2: 4 | 2 of 2: 4, 4 |" in collapses
    # the differences 0.1 and 0.3: 0.2 -+ 12.706 * 0.1; and twice 0.6, exactly
    row = "`grpo` | +0.200 [-1.071, +1.471] | +0.200 [-1.071, +1.471] | **+0.600 [+0.600, +0.600]** |"
    assert row in differences
    assert "minpro less" in differences
    assert "`minpro` |" not in differences


def test_tables_take_the_place_between_the_marks() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = with_tables(text, "new")
    assert once == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert with_tables(once, "new") == once
    for broken in (text.replace(END, ""), text.replace(BEGIN, ""), text + text, f"{END}\n{BEGIN}"):
        with pytest.raises(ValueError, match="must each stand in it once"):
            with_tables(broken, "new")
