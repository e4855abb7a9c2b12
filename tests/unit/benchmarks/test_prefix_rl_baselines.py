"""Runs compared at equal tokens: what counts, and the accuracy between two measurements."""

import json
from pathlib import Path

import pytest

from benchmarks.prefix_rl_baselines import Curve, Point, accuracy_at, at_equal_tokens, curve, tables


def written(folder: Path, evaluated: dict[int, float], num_steps: int) -> Path:
    """A run folder of `num_steps` steps, each with 64 responses of 10 tokens and prompts of 300 tokens in all."""
    folder.mkdir()
    metrics = {"objective/loss": 1.0, "response/length_mean": 10.0, "batch/tokens": 940.0}
    accuracy = {"reward/accuracy_by_prompt/plain": 0.25}
    lines = [json.dumps({"step": 0, "metrics": {"eval/pass_at_1": 0.1}})]
    lines += [json.dumps({"step": step, "metrics": metrics | accuracy}) for step in range(num_steps)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    results = [{"policy_version": version, "pass_at_1": share} for version, share in evaluated.items()]
    (folder / "evaluations.jsonl").write_text("\n".join(map(json.dumps, results)))
    return folder


def test_a_version_has_used_the_tokens_of_the_steps_before_it(tmp_path: Path) -> None:
    found = curve("plain", 3, written(tmp_path / "run", {4: 0.3, 0: 0.1}, num_steps=4), trained_before=500)
    assert found.points == [Point(0, 500, 0.1), Point(4 * 640, 500 + 4 * 940, 0.3)]
    assert (found.on_plain, found.on_prefixed) == ((0.25, 0.25), None)


def test_accuracy_between_two_measurements_is_on_their_line() -> None:
    points = [(0, 0.0), (100, 0.5), (200, 0.3)]
    assert [accuracy_at(points, tokens) for tokens in (0, 50, 100, 175, 200)] == pytest.approx(
        [0, 0.25, 0.5, 0.35, 0.3]
    )
    with pytest.raises(ValueError, match="201 tokens: the run has 0 to 200"):
        accuracy_at(points, 201)


def test_runs_are_compared_at_the_most_tokens_that_all_have() -> None:
    curves = [
        Curve(kind, seed, [Point(0, 0, 0.0), Point(sampled, 3 * sampled, 0.4)], None, None)
        for kind, sampled in (("plain", 200), ("sft_then_rl", 400), ("prefixed", 100))
        for seed in (0, 1)
    ]
    tokens, found = at_equal_tokens(curves, lambda point: point.sampled)
    assert tokens == 100
    assert found == {"plain": {0: 0.2, 1: 0.2}, "sft_then_rl": {0: 0.1, 1: 0.1}, "prefixed": {0: 0.4, 1: 0.4}}
    text = tables(curves)
    assert "| prefixed | 0.400 | 0.000 | +0.200 ± 0.000 |" in text
    assert "prefixed less sft_then_rl: +0.300 ± 0.000, 2 seeds." in text
    assert "at 300 trained tokens" in text
