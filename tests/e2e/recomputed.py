"""A step's metrics computed again, token by token, from what the run's journal has stored of its rollouts."""

import math
from collections.abc import Sequence

import numpy as np

from minpro_megatron.rollout.journal_reader import StoredGroup, StoredResponse

LARGEST_WEIGHT = 5.0  # MinPRO's clip of the demo: 1 - 1 to 1 + 4


def recomputed(groups: Sequence[StoredGroup], step: int) -> dict[str, float]:
    """By metric name: rewards, staleness, lengths, mismatch, ratios and their prefixes, weights."""
    responses = [response for group in groups for response in group.responses]
    rewards, lengths = [r.reward for r in responses], [r.num_tokens for r in responses]
    stale = [step - group.oldest_version for group in groups if group.oldest_version is not None]
    equal = [len({response.reward for response in group.responses}) == 1 for group in groups]
    prompts = sum(len(group.prompt_token_ids) * len(group.responses) for group in groups)
    right = float(np.mean([reward > 0 for reward in rewards]))
    return _of_tokens([_tokens(response, step) for response in responses]) | {
        "reward/mean": float(np.mean(rewards)),
        "reward/accuracy": right,
        "reward/accuracy_by_prompt/plain": right,
        "reward/equal_groups": float(np.mean(equal)),
        "staleness/min": min(stale),
        "staleness/mean": float(np.mean(stale)),
        "staleness/max": max(stale),
        "response/length_mean": float(np.mean(lengths)),
        "response/length_max": max(lengths),
        "response/truncated_fraction": float(np.mean([r.finish_reason == "length" for r in responses])),
        "batch/tokens": prompts + sum(lengths),
    }


def _tokens(response: StoredResponse, step: int) -> list[dict[str, float]]:
    """What is known of each token of a response."""
    trained, behavior = response.trained_log_probs, response.behavior_log_probs
    rollout, versions = response.rollout_log_probs, response.policy_versions
    assert trained is not None
    assert behavior is not None
    assert rollout is not None
    assert versions is not None
    deltas = [float(new) - float(old) for new, old in zip(trained, behavior, strict=True)]
    found = []
    for place, delta in enumerate(deltas):
        log_minimum = min(deltas[:place], default=0.0)
        weight = min(LARGEST_WEIGHT, math.exp(log_minimum + delta))
        found.append(
            {
                "position": float(2 ** int(math.log2(place + 1))),
                "staleness": float(step - versions[place]),
                "delta": delta,
                "is_smallest": float(place == deltas.index(min(deltas))),
                "share": place / max(1, len(deltas) - 1),
                "mismatch": float(rollout[place]) - float(behavior[place]),
                "prefix_min/mean": math.exp(log_minimum),
                "prefix_ratio/log": math.fsum(deltas[: place + 1]),
                "prefix_ratio/surrogate_log": log_minimum + delta,
                "prefix_ratio/gap_abs": abs(log_minimum + delta - math.fsum(deltas[: place + 1])),
                "objective/weight": weight,
                "objective/weight_square": weight**2,
                "clipped": float(math.exp(log_minimum + delta) > LARGEST_WEIGHT),
            }
        )
    return found


def _of_tokens(responses: list[list[dict[str, float]]]) -> dict[str, float]:
    rows = [row for response in responses for row in response]
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    delta, minimum, mismatch = column["delta"], column["prefix_min/mean"], column["mismatch"]
    ratio, weight = np.exp(delta), column["objective/weight"]
    found = {
        "ratio/mean": ratio.mean(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "ratio/square_mean": (ratio**2).mean(),
        "ratio/log_second_moment": (delta**2).mean(),
        "ratio/effective_sample_size": ratio.mean() ** 2 / (ratio**2).mean(),
        "ratio/min_position": column["share"][column["is_smallest"] > 0].mean(),
        "policy/kl_k1": -delta.mean(),
        "policy/kl_k2": (delta**2 / 2).mean(),
        "policy/kl_k3": (ratio - 1 - delta).mean(),
        "prefix_min/mean": minimum.mean(),
        "prefix_min/min": minimum.min(),
        "prefix_min/below_one": (minimum < 1).mean(),
        "prefix_ratio/log_mean": column["prefix_ratio/log"].mean(),
        "prefix_ratio/surrogate_log_mean": column["prefix_ratio/surrogate_log"].mean(),
        "prefix_ratio/gap_abs_mean": column["prefix_ratio/gap_abs"].mean(),
        "objective/weight_mean": weight.mean(),
        "objective/weight_square_mean": (weight**2).mean(),
        "objective/effective_sample_size": weight.mean() ** 2 / (weight**2).mean(),
        "objective/clipped_fraction": column["clipped"].mean(),
        "objective/masked_fraction": 0.0,
        "mismatch/log_prob_abs_mean": np.abs(mismatch).mean(),
        "mismatch/log_prob_abs_max": np.abs(mismatch).max(),
        "mismatch/kl_k3": (np.exp(-mismatch) - 1 + mismatch).mean(),
    }
    for what in ("position", "staleness"):
        for bucket in np.unique(column[what]):
            held = column[what] == bucket
            for name, values in column.items():
                if "/" in name:
                    found[f"{name}_by_{what}/{bucket:.0f}"] = values[held].mean()
            size = weight[held].mean() ** 2 / (weight[held] ** 2).mean()
            found[f"objective/effective_sample_size_by_{what}/{bucket:.0f}"] = size
    return {name: float(value) for name, value in found.items()}
