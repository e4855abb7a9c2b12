"""The layout of TensorBoard's custom scalars: the metrics of each chart, and the charts in groups.

Names are regular expressions that TensorBoard matches from the beginning; the buckets of a family are lines of one
chart."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from minpro_megatron.config.run import RunConfig

HEADLINES = (
    "eval/pass_at_1", "eval/mean_reward", "reward/accuracy", "reward/mean",
    "objective/effective_sample_size", "throughput/response_tokens_per_s",
)  # fmt: skip

_SETTINGS = (
    "seed", "num_global_steps", "model", "data", "parallel", "objective", "loss", "optimizer", "batch", "sampling",
    "staleness",
)  # fmt: skip

_CHARTS: dict[str, dict[str, list[str]]] = {
    "reward": {
        "accuracy of rollouts": ["reward/accuracy$", "reward/accuracy_by_prompt/.*"],
        "held-out pass@1": ["eval/pass_at_1$", "evaluation/accuracy/.*"],
        "mean reward": ["reward/mean$", "reward/min$", "reward/max$"],
        "held-out mean reward": ["eval/mean_reward$", "evaluation/mean_reward/.*"],
        "not graded": ["reward/grader_failed$", "reward/grader_timed_out$", "reward/groups_not_graded$"],
        "groups of equal rewards": ["reward/equal_groups$", "reward/equal_groups_by_prompt/.*"],
        "response length": ["response/length_mean$", "response/length_max$", "response/length_by_prompt/.*"],
        "truncated responses": ["response/truncated_fraction$"],
    },
    "off-policyness": {
        "staleness": ["staleness/.*"],
        "KL(old || policy)": ["policy/kl_.*"],
        "importance ratio, quantiles": ["ratio/quantile_.*"],
        "prefix minimum, quantiles": ["prefix_min/quantile_.*"],
        "prefix minimum by position": ["prefix_min/mean_by_position/.*"],
        "prefix minimum by staleness": ["prefix_min/mean_by_staleness/.*"],
        "log of cumulative ratio and of its surrogate": ["prefix_ratio/log_mean$", "prefix_ratio/surrogate_log_mean$"],
        "log of cumulative ratio by position": ["prefix_ratio/log_by_position/.*"],
        "log of surrogate by position": ["prefix_ratio/surrogate_log_by_position/.*"],
        "surrogate's absolute error by position": ["prefix_ratio/gap_abs_by_position/.*"],
        "surrogate's absolute error by staleness": ["prefix_ratio/gap_abs_by_staleness/.*"],
        "surrogate's error, quantiles": ["prefix_ratio/gap_quantile_.*"],
        "server against trainer": ["mismatch/log_prob_abs_mean$", "mismatch/kl_k3$"],
    },
    "objective": {
        "loss": ["objective/loss$"],
        "weight": ["objective/weight_mean$"],
        "weight by position": ["objective/weight_by_position/.*"],
        "weight by staleness": ["objective/weight_by_staleness/.*"],
        "effective sample size": [
            "objective/effective_sample_size$",
            "ratio/effective_sample_size$",
            "ratio/sequence_effective_sample_size$",
        ],
        "effective sample size by position": ["objective/effective_sample_size_by_position/.*"],
        "effective sample size by staleness": ["objective/effective_sample_size_by_staleness/.*"],
        "clipped and masked tokens": ["objective/clipped_fraction$", "objective/masked_fraction$"],
        "masked by corrections": ["corrections/.*_tokens$", "corrections/.*_sequences$"],
        "weight of corrections": ["corrections/weight_mean$"],
    },
    "optimisation": {
        "entropy": ["policy/entropy$"],
        "gradient norm": ["optimizer/grad_norm$", "optimizer/grad_norm_max$"],
        "learning rate": ["optimizer/learning_rate$"],
        "factor of the learning rate": ["optimizer/learning_rate_factor$"],
        "skipped updates": ["optimizer/skipped_updates$"],
        "alarms": ["alarms/.*"],
    },
    "throughput": {
        "seconds per step": ["time/.*"],
        "response tokens per second": ["throughput/response_tokens_per_s$"],
        "trained tokens per second": ["throughput/trained_tokens_per_s.*"],
        "TFLOP/s per GPU": ["throughput/tflops_per_gpu$"],
        "model FLOPs utilisation": ["throughput/mfu$"],
        "idle shares": ["overlap/.*"],
        "batch": ["batch/padding_fraction$", "batch/imbalance$"],
    },
    "fleet": {
        "servers": ["fleet/members$", "fleet/current$", "fleet/outdated$", "fleet/slow$"],
        "groups": ["fleet/groups_in_flight$", "fleet/groups_waiting$"],
        "tokens per second of a response": ["fleet/tokens_per_s/.*"],
        "retries, moves, restarts": ["fleet/retries$", "fleet/moved_groups$", "fleet/restarts$"],
        "failures": ["fleet/failures/.*", "fleet/invalid_answers/.*"],
        "publication": ["publish/paused_s$", "publish/failures$"],
        "canary": ["publish/canary_.*"],
    },
    "memory": {
        "GPU, maximum over ranks": ["memory/gpu_.*"],
        "host": ["memory/host_bytes/.*"],
    },
}
# In the form that SummaryWriter.add_custom_scalars takes.
LAYOUT = {group: {chart: ["Multiline", names] for chart, names in charts.items()} for group, charts in _CHARTS.items()}


def hyperparameters(config: RunConfig) -> dict[str, str | float]:
    """The settings that decide what a run computes and that are not the defaults, as section.key, for TensorBoard's
    table of runs; the objective's name and the seed always. Lists are JSON, null is excluded. The settings of devices
    and processes are excluded, because TensorBoard's alphabetical order would mix them with these."""
    changed = config.model_dump(mode="json", include=set(_SETTINGS), exclude_defaults=True)
    found: dict[str, str | float] = {"objective.name": config.objective.name, "seed": config.seed}
    for name, value in _flat(changed):
        if value is not None:
            found[name] = json.dumps(value) if isinstance(value, bool | list) else value
    return found


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
