"""A run's metrics computed again, token by token, from what its journal has stored.

Without a source in the journal (`UNSOURCED`) are: the entropy, for of the policy's distribution only the log-probs of
sampled tokens are stored; gradients, learning rate and skipped updates; how rows were packed, how long anything took
and how long servers were idle; what fleet and publications did beside sampling; the model's operations, so TFLOP/s;
memory, alarms, and how many responses could not be graded. Rates are of the journal's tokens over the times that the
same entry of metrics.jsonl tells; of the held-out prompts the journal has the results, not the responses.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from minpro_megatron.buffer.journal_reader import StoredGroup, StoredResponse
from minpro_megatron.records import EvaluationResult

MAX_WEIGHT = 5.0  # MinPRO's clip of the demo: 1 - 1 to 1 + 4
UNSOURCED = (
    "reward/grader_", "reward/attempts_failed", "reward/groups_not_graded", "policy/entropy", "optimizer/",
    "batch/padding_fraction", "batch/imbalance", "time/", "overlap/server_idle_share",
    "fleet/members", "fleet/current", "fleet/outdated", "fleet/slow", "fleet/groups_in_flight", "fleet/groups_waiting",
    "fleet/idle_s", "fleet/hung", "fleet/out_of_files", "fleet/failed_evaluations", "fleet/retries",
    "fleet/moved_groups", "fleet/restarts", "fleet/tokens_per_s/", "publish/",
    "throughput/tflops_per_gpu", "memory/", "alarms/",
)  # fmt: skip


def recomputed(groups: Sequence[StoredGroup], step: int, prefixed: Collection[str] = ()) -> dict[str, float]:
    """By metric name: rewards, staleness, lengths, mismatch, ratios and their prefixes, weights, the loss. `groups` are
    those that global step `step` consumed, `prefixed` the ids of prompts with a given prefix."""
    lengths = [response.num_tokens for group in groups for response in group.responses]
    stale = [step - group.oldest_version for group in groups if group.oldest_version is not None]
    prompts = sum(len(group.prompt_token_ids) * len(group.responses) for group in groups)
    rewards, truncated = zip(
        *[(r.reward, r.finish_reason == "length") for group in groups for r in group.responses], strict=True
    )
    kinds = {
        "prefixed": [group for group in groups if group.prompt_id in prefixed],
        "plain": [group for group in groups if group.prompt_id not in prefixed],
    }
    by_kind = {
        f"{name}_by_prompt/{kind}": value
        for kind, held in kinds.items()
        if held
        for name, value in _of_kind(held).items()
    }
    of_all = _of_kind(groups)
    of_all["response/length_mean"] = of_all.pop("response/length")
    return (of_all | by_kind | _of_tokens(_token_rows(groups, step))) | {
        "reward/mean": float(np.mean(rewards)),
        "reward/min": min(rewards),
        "reward/max": max(rewards),
        "staleness/min": min(stale),
        "staleness/mean": float(np.mean(stale)),
        "staleness/max": max(stale),
        "response/length_max": max(lengths),
        "response/truncated_fraction": float(np.mean(truncated)),
        "batch/tokens": prompts + sum(lengths),
    }


def _of_kind(groups: Sequence[StoredGroup]) -> dict[str, float]:
    responses = [response for group in groups for response in group.responses]
    return {
        "reward/accuracy": float(np.mean([(response.reward or 0) >= 1 for response in responses])),
        "reward/equal_groups": float(np.mean([len({r.reward for r in group.responses}) == 1 for group in groups])),
        "response/length": float(np.mean([response.num_tokens for response in responses])),
    }


def recomputed_quantiles(groups: Sequence[StoredGroup], step: int) -> dict[str, tuple[float, bool]]:
    """By metric name the token's value below or at which so many percent are, and whether the metric is its exp. The
    metric is read off a histogram: see `is_in_the_same_bin`."""
    rows = [row for response in _token_rows(groups, step) for row in response]
    found = {}
    for called, column, is_exp in (
        ("ratio/quantile", "delta", True),
        ("prefix_min/quantile", "log_minimum", True),
        ("prefix_ratio/gap_quantile", "gap", False),
    ):
        ordered = sorted(row[column] for row in rows)
        for percent in (1, 50, 99):
            place = max(1, math.ceil(percent / 100 * len(ordered)))
            found[f"{called}_{percent:02d}"] = ordered[place - 1], is_exp
    return found


def is_in_the_same_bin(found: float, expected: float) -> bool:
    """Whether two logs differ by at most the width of the histograms' bins: 3e-4 near 0, 3 % far from it."""
    return abs(math.asinh(found / 0.01) - math.asinh(expected / 0.01)) <= 1 / 32 + 1e-6


def recomputed_rates(groups: Sequence[StoredGroup], metrics: Mapping[str, float], num_ranks: int) -> dict[str, float]:
    """By metric name, with the times that `metrics` of the same step tells."""
    sampled = sum(response.num_tokens for group in groups for response in group.responses)
    trained = sampled + sum(len(group.prompt_token_ids) * len(group.responses) for group in groups)
    return {
        "throughput/response_tokens_per_s": sampled / metrics["time/step_s"],
        "throughput/trained_tokens_per_s": trained / metrics["time/train_s"],
        "throughput/trained_tokens_per_s_per_gpu": trained / metrics["time/train_s"] / num_ranks,
        "overlap/trainer_wait_share": metrics["time/wait_for_batch_s"] / metrics["time/step_s"],
    }


def recomputed_totals(
    groups: Sequence[StoredGroup], evaluations: Sequence[EvaluationResult], step: int
) -> dict[str, float]:
    """By metric name what a run's one server has sampled when version step + 1 is published: in delay mode all that was
    issued with earlier versions, and nothing else. `groups` are those of the whole run, where no request failed."""
    sampled = [group for group in groups if group.issued_version <= step]
    evaluated = [result for result in evaluations if result.policy_version <= step]
    heldout = sum(one.mean_response_tokens * one.num_prompts * one.samples_per_prompt for one in evaluated)
    group_size = len(groups[0].responses)  # evaluations are sampled in groups of the same size
    evaluation_groups = sum(one.num_prompts * -(-one.samples_per_prompt // group_size) for one in evaluated)
    return {
        "fleet/groups": len(sampled) + evaluation_groups,
        "fleet/tokens/0": heldout + sum(response.num_tokens for group in sampled for response in group.responses),
    }


def recomputed_evaluation(result: EvaluationResult) -> dict[str, float]:
    """The entry of one evaluation of the held-out prompts."""
    return {
        "eval/pass_at_1": result.pass_at_1,
        "eval/standard_error": result.standard_error,
        "eval/mean_reward": result.mean_reward,
        "eval/not_graded": result.not_graded,
        "eval/response_length_mean": result.mean_response_tokens,
    }


def _token_rows(groups: Sequence[StoredGroup], step: int) -> list[list[dict[str, float]]]:
    """What is known of each token, by response."""
    found = []
    for group in groups:
        rewards = np.array([response.reward for response in group.responses])
        spread = rewards.std(ddof=1) + 1e-6
        for response in group.responses:
            # as GRPO says, rounded to float32 as the trainer holds it
            advantage = float(np.float32((response.reward - rewards.mean()) / spread))
            found.append(_tokens(response, advantage, step))
    return found


def _tokens(response: StoredResponse, advantage: float, step: int) -> list[dict[str, float]]:
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
        weight = min(MAX_WEIGHT, math.exp(log_minimum + delta))
        found.append(
            {
                "position": float(2 ** int(math.log2(place + 1))),
                "staleness": float(step - versions[place]),
                "delta": delta,
                "log_minimum": log_minimum,
                "gap": log_minimum + delta - math.fsum(deltas[: place + 1]),
                "loss": -weight * advantage * float(trained[place]),
                "is_smallest": float(place == deltas.index(min(deltas))),
                "share": place / max(1, len(deltas) - 1),
                "mismatch": float(rollout[place]) - float(behavior[place]),
                "prefix_min/mean": math.exp(log_minimum),
                "prefix_ratio/log": math.fsum(deltas[: place + 1]),
                "prefix_ratio/surrogate_log": log_minimum + delta,
                "prefix_ratio/gap_abs": abs(log_minimum + delta - math.fsum(deltas[: place + 1])),
                "objective/weight": weight,
                "objective/weight_square": weight**2,
                "clipped": float(math.exp(log_minimum + delta) > MAX_WEIGHT),
            }
        )
    return found


def _of_tokens(responses: list[list[dict[str, float]]]) -> dict[str, float]:
    rows = [row for response in responses for row in response]
    column = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    delta, minimum, mismatch = column["delta"], column["prefix_min/mean"], column["mismatch"]
    ratio, weight = np.exp(delta), column["objective/weight"]
    sequence_ratio = np.exp(np.clip([response[-1]["prefix_ratio/log"] for response in responses], -20, 20))
    found = {
        "ratio/mean": ratio.mean(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "ratio/square_mean": (ratio**2).mean(),
        "ratio/log_second_moment": (delta**2).mean(),
        "ratio/effective_sample_size": ratio.mean() ** 2 / (ratio**2).mean(),
        "ratio/sequence_mean": sequence_ratio.mean(),
        "ratio/sequence_square_mean": (sequence_ratio**2).mean(),
        "ratio/sequence_effective_sample_size": sequence_ratio.mean() ** 2 / (sequence_ratio**2).mean(),
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
        "objective/loss": math.fsum(column["loss"]) / len(rows),
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
