"""A run of the stability study: task, sampling, gradients, delay, and that a seed repeats it bit by bit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.stability_study import task, work
from benchmarks.stability_study.gradients import MiniBatch, forward_groups, gradient, loss_slopes, moments
from benchmarks.stability_study.policy import Policy
from benchmarks.stability_study.record import StoredTrial, append, as_line, read_record, stored_trial
from benchmarks.stability_study.trial import Rollouts, Trial, TrialKey, TrialResult, TrialSettings, objective_section
from benchmarks.stability_study.warm_start import initial_weights, noisy_responses
from minpro_megatron.config.objective import ObjectiveSection
from minpro_megatron.objective.advantages import group_advantages
from minpro_megatron.objective.loss_functions.loss_call import objective_loss
from tests.support.reference_models import one_thread

SMALL = TrialSettings(
    num_global_steps=3, num_prompts=4, responses_per_prompt=4, mini_batch_prompts=2, warmup_updates=1,
    evaluate_every=1, evaluation_prompts=8, compare_every=2,
)  # fmt: skip
RECORD = Path(work.__file__).parent / "results.jsonl"
KEY = TrialKey("test", "minpro", 1, 9001, 1e-3)  # a seed of no other run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def warm_policy() -> Policy:
    policy = Policy()
    policy.load_state_dict(initial_weights())
    return policy


def run(key: TrialKey, settings: TrialSettings = SMALL) -> TrialResult:
    return Trial(key, initial_weights(), settings).run()


def test_a_response_is_right_only_if_every_token_is() -> None:
    prompts = task.make_prompts(3, 5)
    right = task.right_responses(prompts)
    value = prompts[1, 0]
    for place, summand in enumerate(prompts[1, 1:]):
        value = (value + summand) % 10
        assert right[1, 2 * place : 2 * place + 2].tolist() == [summand, value]
    assert right.shape == (5, task.RESPONSE_TOKENS)
    assert task.RESPONSE_TOKENS >= 60
    for place in range(task.RESPONSE_TOKENS):
        changed = right.copy()
        changed[2, place] = (changed[2, place] + 1) % 10
        assert task.rewards(prompts, changed).tolist() == [1, 1, 0, 1, 1]


def test_the_warm_starts_mistakes_are_continued() -> None:
    prompts, random = task.make_prompts(4, 400), np.random.default_rng(0)
    responses = noisy_responses(prompts, 0.07, random)
    assert (responses[:, ::2] == prompts[:, 1:]).all()
    before = np.concatenate([prompts[:, :1], responses[:, 1:-1:2]], axis=1)
    wrong = (before + prompts[:, 1:]) % 10 != responses[:, 1::2]
    assert 0.06 < wrong.mean() < 0.08
    assert (noisy_responses(prompts, 0.0, random) == task.right_responses(prompts)).all()


def test_sampling_with_a_cache_draws_the_tokens_of_whole_forward_passes() -> None:
    policy, prompts = warm_policy(), torch.from_numpy(task.make_prompts(5, 3))
    sequences = policy.sample(prompts, 2, torch.Generator().manual_seed(8))
    shape = 6, task.RESPONSE_TOKENS, task.VOCABULARY
    noise = -torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(8)).log()
    with torch.no_grad():
        logits = policy(sequences[:, :-1])[:, task.PROMPT_TOKENS - 1 :]
    assert (sequences[:, : task.PROMPT_TOKENS] == prompts.repeat_interleave(2, 0)).all()
    assert ((logits + noise).argmax(-1) == sequences[:, task.PROMPT_TOKENS :]).all()
    chosen, entropies = policy.log_probs(sequences)
    probabilities = logits.double().softmax(-1)
    expected = probabilities.gather(2, sequences[:, task.PROMPT_TOKENS :, None]).squeeze(2).log()
    torch.testing.assert_close(chosen.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies.double(), -(probabilities * probabilities.log()).sum(-1), rtol=0, atol=1e-5)


def test_sampled_tokens_have_the_policys_probabilities() -> None:
    policy, prompt = warm_policy(), torch.from_numpy(task.make_prompts(6, 1))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(0.6)  # a policy that is unsure
        sequences = policy.sample(prompt, 1000, torch.Generator().manual_seed(1))
        expected = policy(prompt)[0, -1].softmax(-1)
    found = torch.bincount(sequences[:, task.PROMPT_TOKENS], minlength=task.VOCABULARY) / len(sequences)
    error = (expected * (1 - expected) / len(sequences)).sqrt()
    assert (expected > 0.02).sum() >= 3
    assert ((found - expected).abs() < 4 * error).all()


def mini_batch(policy: Policy) -> MiniBatch:
    prompts = task.make_prompts(9, 3)
    sequences = policy.sample(torch.from_numpy(prompts), 4, torch.Generator().manual_seed(2))
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        behavior = policy.log_probs(sequences)[0] + 0.3 * torch.randn(12, task.RESPONSE_TOKENS, generator=random)
    advantages = np.concatenate(
        [group_advantages([1, 0, 0, 0]), group_advantages([0] * 4), group_advantages([1, 1, 0, 0])]
    )
    return MiniBatch(sequences, behavior, torch.from_numpy(advantages), 3, seed=5)


@pytest.mark.parametrize("name", ["minpro", "shuffled_minpro", "m2po", "gspo"])
def test_the_groups_gradients_sum_to_that_of_the_whole_loss(name: str) -> None:
    policy = warm_policy()
    batch = mini_batch(policy)
    log_probs, _ = forward_groups(policy.log_probs, batch)
    found = gradient(policy, log_probs, loss_slopes(objective_section(name), log_probs, batch), keep_graph=False)
    whole, _ = policy.log_probs(batch.sequences)
    loss = objective_loss(
        objective_section(name), whole, batch.behavior_log_probs_BT, batch.advantages_B, torch.ones_like(whole), seed=5
    )
    expected = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(policy.parameters()))])
    assert float(expected.norm()) > 0
    torch.testing.assert_close(found.vector, expected, rtol=1e-4, atol=1e-7)
    assert found.squared_norm == pytest.approx(float(expected.double().square().sum()), rel=1e-5)


def test_the_variance_of_a_sum_is_estimated_without_bias() -> None:
    random = torch.Generator().manual_seed(0)
    parts = 2 + 3 * torch.randn(4000, 4, 5, generator=random)  # repetitions, groups, parameters
    estimates = torch.tensor([moments(one)[1] for one in parts])
    assert float(estimates.mean()) == pytest.approx(4 * 5 * 9, rel=0.03)


def test_a_run_repeated_from_its_key_is_the_same_line() -> None:
    first, second = (as_line(stored_trial(KEY, run(KEY), SMALL, "setup", "machine")) for _ in range(2))
    other = replace(KEY, seed=9002)
    assert first == second
    assert first != as_line(stored_trial(KEY, run(other), SMALL, "setup", "machine"))


@pytest.mark.parametrize(("delay", "sampled_by"), [(0, [0, 1, 2]), (1, [0, 0, 1]), (16, [0, 0, 0])])
def test_a_batch_is_sampled_by_the_version_of_its_delay(
    delay: int, sampled_by: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    consumed = list[Rollouts]()
    weights = list[dict[str, torch.Tensor]]()
    original = Trial._global_step

    def observed(self: Trial, step: int, rollouts: Rollouts, result: TrialResult) -> None:
        weights.append({name: weight.clone() for name, weight in self._policy.state_dict().items()})
        consumed.append(rollouts)
        original(self, step, rollouts, result)

    monkeypatch.setattr(Trial, "_global_step", observed)
    run(replace(KEY, delay=delay))
    for rollouts, version in zip(consumed, sampled_by, strict=True):
        policy = Policy()
        policy.load_state_dict(weights[version])
        assert (policy.log_probs(rollouts.sequences)[0] == rollouts.behavior_log_probs_BT).all()
    assert not torch.equal(weights[0]["head.weight"], weights[1]["head.weight"])


def test_objectives_and_delays_share_prompts_and_noise() -> None:
    two_steps = replace(SMALL, num_global_steps=2)
    results = [
        run(replace(KEY, objective=name, delay=delay), two_steps) for name in ("minpro", "gspo") for delay in (0, 1)
    ]
    assert len({result.steps[0]["reward"] for result in results}) == 1
    assert len({result.heldout[0] for result in results}) == 1
    assert len({result.heldout[-1] for result in results} | {result.steps[-1]["entropy"] for result in results}) > 1


def test_gradients_are_compared_at_the_same_weights_and_responses() -> None:
    weights = run(replace(KEY, delay=2, learning_rate=2e-3)).compared
    assert len(weights) == 2  # steps 0 and 2
    for of in ("squared_norm", "variance"):
        assert weights[0][f"minpro/{of}"] == pytest.approx(weights[0][f"cispo/{of}"], rel=1e-3)  # ratios of 1
        assert 0 < weights[1][f"minpro/{of}"] < 0.99 * weights[1][f"cispo/{of}"]


def test_scaled_cispo_multiplies_the_rate_by_the_mean_prefix_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = dict[str, list[float]]()
    original = Trial._apply

    def observed(self: Trial, found: object, rate_factor: float) -> None:
        factors.setdefault(self._key.objective, []).append(rate_factor)
        original(self, found, rate_factor)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Trial, "_apply", observed)
    steps = run(replace(KEY, objective="scaled_cispo", delay=2)).steps
    run(replace(KEY, objective="cispo", delay=2))
    assert set(factors["cispo"]) == {1.0}
    means = [np.mean(factors["scaled_cispo"][2 * step : 2 * step + 2]) for step in range(3)]
    assert means == pytest.approx([step["prefix_min/mean"] for step in steps])
    assert means[0] > means[-1]


def test_a_gradient_that_is_not_finite_ends_the_run() -> None:
    broken = {name: weight.clone() for name, weight in initial_weights().items()}
    broken["head.weight"][3] = torch.nan
    result = Trial(KEY, broken, SMALL).run()
    assert result.ended_at == 0
    assert len(result.heldout) == 1


def test_an_interrupted_series_gives_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, keys = replace(SMALL, num_global_steps=1), [KEY, replace(KEY, objective="grpo")]
    monkeypatch.setattr(work, "missing_keys", lambda record: [key for key in keys if key not in record])
    lines = list[str]()
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    work.run_missing(whole, initial_weights(), settings, lines.append)
    with monkeypatch.context() as broken:
        broken.setattr(work, "append", _interrupted_after(1))
        with pytest.raises(KeyboardInterrupt):
            work.run_missing(parts, initial_weights(), settings, lines.append)
    assert list(read_record(parts)) == keys[:1]
    work.run_missing(parts, initial_weights(), settings, lines.append)
    assert parts.read_bytes() == whole.read_bytes()
    assert lines[0].startswith(f"{KEY.name}: 0.")
    assert "1 runs in the record, 1 known to be missing" in lines[0]
    trial = read_record(whole)[KEY]
    assert work.repeated(trial, initial_weights(), settings) == trial
    with pytest.raises(ValueError, match="its setup"):
        work.repeated(trial, initial_weights(), SMALL)
    with pytest.raises(ValueError, match=r"has runs of another setup, .* go on with its own program"):
        work.run_missing(whole, initial_weights(), SMALL, lines.append)


def test_the_setup_covers_the_objectives_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = initial_weights()
    before = work.setup_digest(weights, TrialSettings())
    assert {trial.setup for trial in read_record(RECORD).values()} <= {before}
    original = work.objective_section

    def changed(name: str) -> ObjectiveSection:
        section = original(name)
        return section.model_copy(update={"aggregation": "sequence_mean"}) if name == "cppo" else section

    monkeypatch.setattr(work, "objective_section", changed)
    assert work.setup_digest(weights, TrialSettings()) != before


def _interrupted_after(count: int) -> Callable[[Path, StoredTrial], None]:
    done = list[StoredTrial]()

    def append_or_stop(path: Path, trial: StoredTrial) -> None:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(trial)
        append(path, trial)

    return append_or_stop
