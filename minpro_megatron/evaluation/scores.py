"""Computes a benchmark's scores from its samples: accuracy, pass@k, maj@k, lengths."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from minpro_megatron.config.reward import RIGHT_REWARD, is_right
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.evaluation.intervals import Estimate, average, estimates, resampled_means
from minpro_megatron.evaluation.majority import majority_at_k, votes
from minpro_megatron.evaluation.pass_at_k import mean_pass_at_k, pass_at_k_values
from minpro_megatron.evaluation.samples import SampledGroup, SampledResponse
from minpro_megatron.evaluation.sampling import with_lowest
from minpro_megatron.records import NOT_GRADED


class BenchmarkScores(msgspec.Struct, frozen=True):
    """A benchmark's scores. Fractions are between 0 and 1; intervals are over prompts. `pass_at_k` has k = 1 to n."""

    name: str
    num_prompts: int
    samples_per_prompt: int
    accuracy: Estimate  # avg@n: over all samples
    standard_error: float  # of the accuracy, over prompts; 0 for a single prompt
    pass_at_k: dict[int, Estimate]
    majority_at_k: dict[int, Estimate]
    mean_response_tokens: float
    truncated_fraction: float  # cut at the length limit
    no_answer_fraction: float  # the grader found no answer to compare
    ungraded_responses: int  # the grader failed: counted as wrong, and as 0 or the lowest reward in the mean
    mean_reward: Estimate | None = None  # None: written by a version without this field


class Scores(msgspec.Struct, frozen=True):
    """One model's scores on its benchmarks; `average` is the mean of their accuracies with equal weights."""

    model: str
    policy_version: int
    settings: dict
    benchmarks: list[BenchmarkScores]
    average: Estimate
    right_reward: float = RIGHT_REWARD  # a response counts as correct from this reward on


@dataclass(frozen=True, slots=True)
class Answers:
    """A benchmark's samples without their texts, arrays [prompts, samples]."""

    is_right: np.ndarray
    rewards: np.ndarray  # those of ungraded responses are 0 or the lowest of the others
    votes: np.ndarray
    num_tokens: np.ndarray
    is_truncated: np.ndarray
    has_answer: np.ndarray
    num_problems: int


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4, ... and `largest` itself.

    >>> powers_of_two(12)
    [1, 2, 4, 8, 12]
    """
    return [*(1 << i for i in range(largest.bit_length()) if 1 << i < largest), largest]


def answers_of(
    benchmark: str, groups: Iterable[SampledGroup], samples_per_prompt: int, right_reward: float = RIGHT_REWARD
) -> Answers:
    """The benchmark's samples in `groups`. Raises ValueError unless every prompt has the same number of samples, and if
    none of them could be graded."""
    responses: dict[str, dict[int, SampledResponse]] = {}
    for group in groups:
        if group.benchmark == benchmark:
            of_prompt = responses.setdefault(group.prompt_id, {})
            of_prompt.update(enumerate(group.responses, start=group.first_sample))
    wanted = set(range(samples_per_prompt))
    if not responses or any(of_prompt.keys() != wanted for of_prompt in responses.values()):
        raise ValueError(f"{benchmark}: not every prompt has its {samples_per_prompt} samples")
    # in an order that does not depend on which response came first: resampling must give the same intervals
    table = [[responses[prompt][sample] for sample in sorted(wanted)] for prompt in sorted(responses)]
    rewards = np.asarray([[_reward(response) for response in row] for row in table])
    if np.isnan(rewards).all():
        raise ValueError(f"{benchmark}: none of its responses could be graded: {table[0][0].problem}")
    right = np.asarray([[is_right(reward, right_reward) for reward in row] for row in rewards.tolist()])
    # If a grader finds correct answers but never reports what it compared, it compares whole responses.
    whole = right.any() and all(response.extracted is None for row in table for response in row)
    answers = [[response.text if whole else response.extracted for response in row] for row in table]
    return Answers(
        is_right=right,
        rewards=with_lowest(rewards),
        votes=np.stack([votes(row, of_row) for row, of_row in zip(answers, right.tolist(), strict=True)]),
        num_tokens=np.asarray([[response.num_tokens for response in row] for row in table]),
        is_truncated=np.asarray([[response.finish_reason == "length" for response in row] for row in table]),
        has_answer=np.asarray([[answer is not None for answer in row] for row in answers]),
        num_problems=int(np.isnan(rewards).sum()),
    )


def _reward(response: SampledResponse) -> float:
    """NaN if it could not be graded, which earlier versions wrote as a reward of 0 with a problem."""
    return NOT_GRADED if response.reward is None or response.problem is not None else response.reward


def score_benchmark(name: str, answers: Answers, seed: int) -> BenchmarkScores:
    """The scores; `seed` is used by the bootstrap and by maj@k's draws."""
    num_prompts, num_samples = answers.is_right.shape
    passes = pass_at_k_values(num_samples, answers.is_right.sum(axis=1), num_samples)
    ks = powers_of_two(num_samples)
    majorities = majority_at_k(answers.votes, ks, derive_seed(seed, f"maj@k/{name}"))
    bootstrap = _bootstrap_seed(seed, name)
    pass_at_k = dict(enumerate(estimates(passes, bootstrap), start=1))
    return BenchmarkScores(
        name=name,
        num_prompts=num_prompts,
        samples_per_prompt=num_samples,
        accuracy=pass_at_k[1],  # the unbiased pass@1 is the mean accuracy
        standard_error=mean_pass_at_k(num_samples, answers.is_right.sum(axis=1).tolist(), 1).standard_error,
        pass_at_k=pass_at_k,
        majority_at_k=dict(zip(ks, estimates(majorities, bootstrap), strict=True)),
        mean_response_tokens=float(answers.num_tokens.mean()),
        truncated_fraction=float(answers.is_truncated.mean()),
        no_answer_fraction=float(1 - answers.has_answer.mean()),
        ungraded_responses=answers.num_problems,
        mean_reward=estimates(answers.rewards.mean(axis=1)[:, None], bootstrap)[0],
    )


def average_accuracy(answers: Mapping[str, Answers], seed: int) -> Estimate:
    """The mean of the benchmarks' accuracies with its interval."""
    accuracies = {name: found.is_right.mean(axis=1)[:, None] for name, found in answers.items()}
    resampled = [resampled_means(values, _bootstrap_seed(seed, name))[:, 0] for name, values in accuracies.items()]
    return average(resampled, [float(values.mean()) for values in accuracies.values()])


def score_all(
    model: str,
    policy_version: int,
    settings: dict,
    samples: Mapping[str, int],
    groups: Sequence[SampledGroup],
    right_reward: float = RIGHT_REWARD,
) -> Scores:
    """The scores of one model. `samples` has the number of samples per prompt of each benchmark; settings["seed"] is
    used.

    Raises ValueError as `answers_of` does.
    """
    seed = int(settings["seed"])
    answers = {name: answers_of(name, groups, count, right_reward) for name, count in samples.items()}
    return Scores(
        model=model,
        policy_version=policy_version,
        settings=settings,
        benchmarks=[score_benchmark(name, found, seed) for name, found in answers.items()],
        average=average_accuracy(answers, seed),
        right_reward=right_reward,
    )


def _bootstrap_seed(seed: int, name: str) -> int:
    return derive_seed(seed, f"bootstrap/{name}")
