"""Every scalar that the system writes: its unit, how its parts merge, and what it means."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from minpro_megatron.metrics.metric import Reduction


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a scalar means: its unit ("" for a pure number), how its parts merge, a line for the README.

    A "derived" scalar is computed from merged ones at the very end (`monitor.step_report`).
    """

    unit: str
    reduction: Reduction | Literal["derived"]
    description: str


# A name that ends in /<...> stands for a family: one scalar for each bucket that holds anything.
METRICS: dict[str, Declaration] = {
    "reward/mean": Declaration("", "mean", "reward of a response"),
    "reward/min": Declaration("", "min", "lowest reward of a response"),
    "reward/max": Declaration("", "max", "highest reward of a response"),
    "reward/accuracy": Declaration("share", "mean", "right responses: their reward is collector.right_reward or more"),
    "reward/equal_groups": Declaration("share", "mean", "groups whose rewards are all equal (no gradient)"),
    "reward/accuracy_by_prompt/<kind>": Declaration(
        "share", "mean", "of those to prompts with a given prefix (prefixed) and without (plain)"
    ),
    "reward/equal_groups_by_prompt/<kind>": Declaration("share", "mean", "equal groups, apart in the same way"),
    "reward/grader_failed": Declaration(
        "responses", "sum", "not graded: the grader raised, returned no finite number or died, since the start"
    ),
    "reward/grader_timed_out": Declaration(
        "responses", "sum", "not graded: the grader exceeded its time, since the start"
    ),
    "reward/groups_not_graded": Declaration(
        "groups", "sum", "dropped because a response could not be graded, since the start"
    ),
    "policy/entropy": Declaration("nats", "mean", "entropy of the policy at a response token"),
    "policy/kl_k1": Declaration("nats", "mean", "k1 estimate of KL(old policy || policy)"),
    "policy/kl_k2": Declaration("nats", "mean", "k2 estimate of it"),
    "policy/kl_k3": Declaration("nats", "mean", "k3 estimate of it"),
    "ratio/mean": Declaration("", "mean", "importance ratio pi / pi_old of a response token"),
    "ratio/min": Declaration("", "min", "smallest importance ratio"),
    "ratio/max": Declaration("", "max", "largest importance ratio"),
    "ratio/square_mean": Declaration("", "mean", "squared importance ratio"),
    "ratio/log_second_moment": Declaration("nats^2", "mean", "squared log of the importance ratio"),
    "ratio/effective_sample_size": Declaration("share", "derived", "mean ratio squared / mean squared ratio"),
    "ratio/quantile_01": Declaration("", "derived", "importance ratio: 1 % of the tokens have less (its log to 3 %)"),
    "ratio/quantile_50": Declaration("", "derived", "median importance ratio"),
    "ratio/quantile_99": Declaration("", "derived", "importance ratio: 1 % of the tokens have more"),
    "ratio/min_position": Declaration("share", "mean", "where a response's smallest ratio sits: 0 first, 1 last"),
    "prefix_min/mean": Declaration("", "mean", "smallest ratio before a token (1 for the first token)"),
    "prefix_min/min": Declaration("", "min", "smallest prefix minimum"),
    "prefix_min/below_one": Declaration("share", "mean", "response tokens whose prefix minimum is below 1"),
    "prefix_min/quantile_01": Declaration(
        "", "derived", "prefix minimum: 1 % of the tokens have less (its log to 3 %)"
    ),
    "prefix_min/quantile_50": Declaration("", "derived", "median prefix minimum"),
    "prefix_min/quantile_99": Declaration("", "derived", "prefix minimum: 1 % of the tokens have more"),
    "prefix_min/mean_by_position/<first>": Declaration("", "mean", "of it at trained tokens <first> to 2 <first> - 1"),
    "prefix_min/mean_by_staleness/<steps>": Declaration("", "mean", "of it at tokens that stale (16: or staler)"),
    "prefix_ratio/log_mean": Declaration("nats", "mean", "log of the product of the ratios up to and with a token"),
    "prefix_ratio/surrogate_log_mean": Declaration(
        "nats", "mean", "log of what MinPRO puts in its place: prefix minimum times ratio"
    ),
    "prefix_ratio/gap_abs_mean": Declaration("nats", "mean", "|log of the surrogate - log of the product|"),
    "prefix_ratio/gap_quantile_01": Declaration("nats", "derived", "that difference: 1 % of the tokens have less"),
    "prefix_ratio/gap_quantile_50": Declaration("nats", "derived", "its median: above 0, the surrogate is the larger"),
    "prefix_ratio/gap_quantile_99": Declaration("nats", "derived", "1 % of the tokens have more (20: or more)"),
    "prefix_ratio/log_by_position/<first>": Declaration("nats", "mean", "log of the product, by position"),
    "prefix_ratio/log_by_staleness/<steps>": Declaration("nats", "mean", "log of the product, by staleness"),
    "prefix_ratio/surrogate_log_by_position/<first>": Declaration("nats", "mean", "log of the surrogate, by position"),
    "prefix_ratio/surrogate_log_by_staleness/<steps>": Declaration(
        "nats", "mean", "log of the surrogate, by staleness"
    ),
    "prefix_ratio/gap_abs_by_position/<first>": Declaration("nats", "mean", "absolute difference, by position"),
    "prefix_ratio/gap_abs_by_staleness/<steps>": Declaration("nats", "mean", "absolute difference, by staleness"),
    "objective/loss": Declaration("", "mean", "value of the surrogate loss"),
    "objective/weight_mean": Declaration("", "mean", "coefficient of the advantage after clipping"),
    "objective/weight_square_mean": Declaration("", "mean", "squared coefficient of the advantage"),
    "objective/effective_sample_size": Declaration("share", "derived", "mean weight squared / mean squared weight"),
    "objective/weight_by_position/<first>": Declaration(
        "", "mean", "weight at trained tokens <first> to 2 <first> - 1"
    ),
    "objective/weight_by_staleness/<steps>": Declaration("", "mean", "weight of tokens that stale (16: or staler)"),
    "objective/weight_square_by_position/<first>": Declaration("", "mean", "squared weight, by position"),
    "objective/weight_square_by_staleness/<steps>": Declaration("", "mean", "squared weight, by staleness"),
    "objective/effective_sample_size_by_position/<first>": Declaration(
        "share", "derived", "mean weight squared / mean squared weight, by position"
    ),
    "objective/effective_sample_size_by_staleness/<steps>": Declaration("share", "derived", "the same by staleness"),
    "objective/clipped_fraction": Declaration("share", "mean", "response tokens whose weight was clipped"),
    "objective/masked_fraction": Declaration(
        "share", "mean", "response tokens left out by the objective or a correction"
    ),
    "staleness/min": Declaration("global steps", "min", "freshest group of the batch"),
    "staleness/mean": Declaration("global steps", "mean", "policy version minus a group's oldest version"),
    "staleness/max": Declaration("global steps", "max", "stalest group of the batch"),
    "response/length_mean": Declaration("tokens", "mean", "length of a response"),
    "response/length_by_prompt/<kind>": Declaration(
        "tokens", "mean", "length of a response to prefixed and plain prompts, without the prefix"
    ),
    "response/length_max": Declaration("tokens", "max", "longest response"),
    "response/truncated_fraction": Declaration("share", "mean", "responses cut at the length limit"),
    "optimizer/grad_norm": Declaration("", "mean", "global gradient norm of an update, before clipping"),
    "optimizer/grad_norm_max": Declaration("", "max", "the largest one of the step's updates"),
    "optimizer/learning_rate": Declaration("", "max", "largest learning rate of the step's updates"),
    "optimizer/skipped_updates": Declaration(
        "updates", "sum", "updates skipped: gradient not finite, or no trained token"
    ),
    "mismatch/log_prob_abs_mean": Declaration("nats", "mean", "|behavior - rollout log-prob| of a token"),
    "mismatch/log_prob_abs_max": Declaration("nats", "max", "largest such difference"),
    "mismatch/kl_k3": Declaration("nats", "mean", "k3 estimate of KL(server || trainer), same weights"),
    "batch/tokens": Declaration("tokens", "sum", "prompt and response tokens trained on in the step"),
    "batch/padding_fraction": Declaration("share", "mean", "row slots that hold padding"),
    "batch/imbalance": Declaration("share", "mean", "work of the busiest data-parallel rank above the mean"),
    "time/wait_for_batch_s": Declaration("s", "max", "trainer waiting for rollouts"),
    "time/score_s": Declaration("s", "max", "behavior log-probs of the batch to come"),
    "time/train_s": Declaration("s", "max", "forward, backward and optimizer updates"),
    "time/publish_s": Declaration("s", "max", "sending the weights to the servers and checking them"),
    "time/checkpoint_s": Declaration("s", "max", "training held up by the checkpoint before the step"),
    "time/monitor_s": Declaration("s", "max", "writing the metrics of the step before"),
    "time/step_s": Declaration("s", "max", "the whole global step"),
    "overlap/trainer_wait_share": Declaration(
        "share", "derived", "of the step in which the trainer waited for a batch"
    ),
    "overlap/server_idle_share": Declaration(
        "share", "mean", "of the servers' time without a group, since the last step"
    ),
    "fleet/members": Declaration("servers", "mean", "servers that answer"),
    "fleet/current": Declaration("servers", "mean", "of them, with the current weights: they get work"),
    "fleet/outdated": Declaration("servers", "mean", "of them, without the current weights: they get no work"),
    "fleet/slow": Declaration("servers", "mean", "of them, far slower than the median: they get work last"),
    "fleet/groups_in_flight": Declaration("groups", "mean", "groups under way when the weights were published"),
    "fleet/groups_waiting": Declaration("groups", "mean", "groups then waiting for a server"),
    "fleet/idle_s": Declaration("s", "sum", "servers' time without a group, since the start"),
    "fleet/groups": Declaration("groups", "sum", "groups sampled since the start, held-out ones included"),
    "fleet/retries": Declaration("groups", "sum", "groups requested again after a failure, since the start"),
    "fleet/moved_groups": Declaration("groups", "sum", "groups moved away from a server that ended, since the start"),
    "fleet/restarts": Declaration("servers", "sum", "servers that came back or lost their weights, since the start"),
    "fleet/hung": Declaration(
        "servers", "sum", "servers that answered and did no work: started again, since the start"
    ),
    "fleet/out_of_files": Declaration(
        "requests", "sum", "that could not be sent because the collector had too many files open, since the start"
    ),
    "fleet/tokens/<server>": Declaration("tokens", "sum", "tokens sampled by a server, since the start"),
    "fleet/tokens_per_s/<server>": Declaration("tokens/s", "mean", "rate of one response on a server"),
    "fleet/failed_evaluations": Declaration(
        "evaluations", "sum", "given up after failures of a group, since the start"
    ),
    "fleet/failures/<kind>": Declaration("requests", "sum", "requests that failed, since the start"),
    "fleet/invalid_answers/<kind>": Declaration(
        "answers", "sum", "answers refused, since the start; none is trained on"
    ),
    "publish/paused_s": Declaration("s", "max", "servers paused while weights change under requests in flight"),
    "publish/bytes_per_s": Declaration(
        "bytes/s", "mean", "weights / time from the first byte to the last server's last"
    ),
    "publish/servers": Declaration("servers", "sum", "servers that hold the new version, verified"),
    "publish/failures": Declaration("servers", "sum", "servers of the lease that do not hold it: they get no work"),
    "publish/canary_abs_mean": Declaration("nats", "mean", "|trainer's - server's log-prob| of the canaries' tokens"),
    "publish/canary_server_max": Declaration("nats", "max", "largest such mean of a single server"),
    "publish/canary_abs_max": Declaration("nats", "max", "largest such difference on any server"),
    "throughput/response_tokens_per_s": Declaration("tokens/s", "mean", "the batch's response tokens / step"),
    "throughput/trained_tokens_per_s": Declaration("tokens/s", "mean", "batch tokens / training time"),
    "throughput/trained_tokens_per_s_per_gpu": Declaration("tokens/s", "mean", "the same by rank"),
    "throughput/tflops_per_gpu": Declaration(
        "TFLOP/s", "mean", "operations of forward and backward of the batch / training time, by rank"
    ),
    "throughput/mfu": Declaration("share", "mean", "of the GPU's dense bfloat16 peak, where it is known"),
    "memory/gpu_allocated_bytes": Declaration("bytes", "max", "most that tensors held on a GPU in the step"),
    "memory/gpu_reserved_bytes": Declaration("bytes", "max", "most that PyTorch held on a GPU in the step"),
    "memory/host_bytes/<role>": Declaration("bytes", "sum", "resident memory of a role's processes, all machines"),
    "alarms/raised": Declaration("alarms", "sum", "alarms since the run's start"),
    "alarms/raised_by_kind/<alarm>": Declaration("alarms", "sum", "of one kind"),
    "eval/pass_at_1": Declaration("share", "mean", "held-out accuracy: right samples"),
    "eval/mean_reward": Declaration("", "mean", "reward of a held-out response"),
    "eval/not_graded": Declaration(
        "responses", "sum", "held-out responses not graded: not right, 0 or the lowest reward"
    ),
    "eval/standard_error": Declaration("share", "mean", "standard error of pass@1 over prompts"),
    "eval/response_length_mean": Declaration("tokens", "mean", "length of a held-out response"),
    "evaluation/accuracy/<benchmark>": Declaration("share", "mean", "right samples; average: of the benchmarks"),
    "evaluation/standard_error/<benchmark>": Declaration("share", "mean", "standard error of it over prompts"),
    "evaluation/mean_reward/<benchmark>": Declaration("", "mean", "reward of a response"),
    "evaluation/not_graded/<benchmark>": Declaration(
        "responses", "sum", "responses not graded: not right, 0 or the lowest reward"
    ),
    "evaluation/pass_at_k/<benchmark>_<k>": Declaration("share", "mean", "prompts with a right one among k samples"),
    "evaluation/majority_at_k/<benchmark>_<k>": Declaration(
        "share", "mean", "prompts whose most frequent answer of k is right"
    ),
    "evaluation/response_length_mean/<benchmark>": Declaration("tokens", "mean", "length of a response"),
    "evaluation/truncated_fraction/<benchmark>": Declaration("share", "mean", "responses cut at the length limit"),
}


def check_declared(names: Iterable[str]) -> None:
    """Raises ValueError if a name is not in METRICS: an undeclared scalar has no unit and no meaning."""
    families = {name.partition("<")[0] for name in METRICS if "<" in name}
    unknown = sorted(name for name in set(names) - METRICS.keys() if name.rpartition("/")[0] + "/" not in families)
    if unknown:
        raise ValueError(f"undeclared metrics {', '.join(unknown)}: declare them in METRICS of {__name__}")


def metric_table() -> str:
    """METRICS as a Markdown table, for the README."""
    lines = ["| metric | unit | reduction | what it is |", "|---|---|---|---|"]
    for name, declaration in METRICS.items():
        description = declaration.description.replace("|", "\\|")
        lines.append(f"| `{name}` | {declaration.unit} | {declaration.reduction} | {description} |")
    return "\n".join(lines) + "\n"
