"""Declarations of all scalars that the system writes: unit, reduction and meaning."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from minpro_megatron.metrics.metric import Reduction


@dataclass(frozen=True, slots=True)
class Declaration:
    """The declaration of a scalar: unit ("" for a dimensionless number), reduction, and the description that
    docs/reference/metrics.md shows.

    A "derived" scalar is computed from merged metrics at the end (`monitor.step_report`).
    """

    unit: str
    reduction: Reduction | Literal["derived"]
    description: str


# A name that ends in /<...> declares a family: one scalar per bucket that is not empty.
METRICS: dict[str, Declaration] = {
    "reward/mean": Declaration("", "mean", "Mean reward of the responses"),
    "reward/min": Declaration("", "min", "Lowest reward of a response"),
    "reward/max": Declaration("", "max", "Highest reward of a response"),
    "reward/accuracy": Declaration(
        "share", "mean", "Share of correct responses: those whose reward is at least reward.right_reward"
    ),
    "reward/equal_groups": Declaration(
        "share", "mean", "Share of prompt groups whose rewards are all equal and which give no gradient"
    ),
    "reward/accuracy_by_prompt/<kind>": Declaration(
        "share", "mean", "Share of correct responses to prompts with a given prefix (prefixed) and without one (plain)"
    ),
    "reward/equal_groups_by_prompt/<kind>": Declaration(
        "share",
        "mean",
        "Share of groups with equal rewards, for prompts with a given prefix (prefixed) and without one (plain)",
    ),
    "reward/grader_failed": Declaration(
        "responses",
        "sum",
        "Number of responses since the start that were not graded because the grader raised an error, returned no "
        "finite number or died",
    ),
    "reward/grader_timed_out": Declaration(
        "responses",
        "sum",
        "Number of responses since the start that were not graded because the grader exceeded its time limit",
    ),
    "reward/attempts_failed": Declaration(
        "attempts",
        "sum",
        "Number of failed attempts since the start to grade a group by a service or an async function; they were "
        "repeated",
    ),
    "reward/groups_not_graded": Declaration(
        "groups", "sum", "Number of groups dropped since the start because a response could not be graded"
    ),
    "policy/entropy": Declaration("nats", "mean", "Mean entropy of the policy at the response tokens"),
    "support/mass": Declaration(
        "share", "mean", "Probability that the policy gives to the ids that truncated sampling kept (sampling.top_k)"
    ),
    "support/size": Declaration("ids", "mean", "Number of ids that truncated sampling kept at a response token"),
    "policy/kl_k1": Declaration("nats", "mean", "k1 estimate of KL(old policy || policy) per response token"),
    "policy/kl_k2": Declaration("nats", "mean", "k2 estimate of KL(old policy || policy) per response token"),
    "policy/kl_k3": Declaration("nats", "mean", "k3 estimate of KL(old policy || policy) per response token"),
    "ratio/mean": Declaration("", "mean", "Mean importance ratio pi / pi_old of the response tokens"),
    "ratio/min": Declaration("", "min", "Smallest importance ratio of a response token"),
    "ratio/max": Declaration("", "max", "Largest importance ratio of a response token"),
    "ratio/square_mean": Declaration("", "mean", "Mean squared importance ratio of the response tokens"),
    "ratio/sequence_mean": Declaration(
        "", "mean", "Mean importance ratio of a whole response: the product of those of its tokens, within exp(+-20)"
    ),
    "ratio/sequence_square_mean": Declaration("", "mean", "Mean squared importance ratio of a whole response"),
    "ratio/log_second_moment": Declaration("nats^2", "mean", "Mean squared log of the importance ratio"),
    "ratio/effective_sample_size": Declaration(
        "share", "derived", "Effective sample size of the importance ratios: (mean ratio)^2 / mean squared ratio"
    ),
    "ratio/sequence_effective_sample_size": Declaration(
        "share",
        "derived",
        "Effective sample size of the importance ratios of whole responses: (mean ratio)^2 / mean squared ratio",
    ),
    "ratio/quantile_01": Declaration(
        "", "derived", "1 % quantile of the importance ratio (accurate to 3 % of its log)"
    ),
    "ratio/quantile_50": Declaration("", "derived", "Median importance ratio"),
    "ratio/quantile_99": Declaration("", "derived", "99 % quantile of the importance ratio"),
    "ratio/min_position": Declaration(
        "share", "mean", "Mean relative position of a response's smallest ratio: 0 is the first token, 1 the last"
    ),
    "prefix_min/mean": Declaration(
        "", "mean", "Mean prefix minimum: the smallest ratio before a token (1 for the first token)"
    ),
    "prefix_min/min": Declaration("", "min", "Smallest prefix minimum"),
    "prefix_min/below_one": Declaration("share", "mean", "Share of response tokens whose prefix minimum is below 1"),
    "prefix_min/quantile_01": Declaration(
        "", "derived", "1 % quantile of the prefix minimum (accurate to 3 % of its log)"
    ),
    "prefix_min/quantile_50": Declaration("", "derived", "Median prefix minimum"),
    "prefix_min/quantile_99": Declaration("", "derived", "99 % quantile of the prefix minimum"),
    "prefix_min/mean_by_position/<first>": Declaration(
        "", "mean", "Mean prefix minimum at the trained tokens <first> to 2 <first> - 1"
    ),
    "prefix_min/mean_by_staleness/<steps>": Declaration(
        "", "mean", "Mean prefix minimum of the tokens with this staleness (16: 16 or more)"
    ),
    "prefix_ratio/log_mean": Declaration(
        "nats", "mean", "Mean log of the prefix ratio: the product of the ratios up to and including a token"
    ),
    "prefix_ratio/surrogate_log_mean": Declaration(
        "nats", "mean", "Mean log of MinPRO's surrogate of the prefix ratio: prefix minimum times ratio"
    ),
    "prefix_ratio/gap_abs_mean": Declaration(
        "nats", "mean", "Mean absolute difference between the logs of MinPRO's surrogate and of the prefix ratio"
    ),
    "prefix_ratio/gap_quantile_01": Declaration(
        "nats", "derived", "1 % quantile of the log of the surrogate minus the log of the prefix ratio"
    ),
    "prefix_ratio/gap_quantile_50": Declaration(
        "nats",
        "derived",
        "Median log of the surrogate minus the log of the prefix ratio; above 0 the surrogate is larger",
    ),
    "prefix_ratio/gap_quantile_99": Declaration(
        "nats",
        "derived",
        "99 % quantile of the log of the surrogate minus the log of the prefix ratio (20: 20 or more)",
    ),
    "prefix_ratio/log_by_position/<first>": Declaration(
        "nats", "mean", "Mean log of the prefix ratio at the trained tokens <first> to 2 <first> - 1"
    ),
    "prefix_ratio/log_by_staleness/<steps>": Declaration(
        "nats", "mean", "Mean log of the prefix ratio of the tokens with this staleness (16: 16 or more)"
    ),
    "prefix_ratio/surrogate_log_by_position/<first>": Declaration(
        "nats", "mean", "Mean log of the surrogate at the trained tokens <first> to 2 <first> - 1"
    ),
    "prefix_ratio/surrogate_log_by_staleness/<steps>": Declaration(
        "nats", "mean", "Mean log of the surrogate of the tokens with this staleness (16: 16 or more)"
    ),
    "prefix_ratio/gap_abs_by_position/<first>": Declaration(
        "nats",
        "mean",
        "Mean absolute difference between the logs of the surrogate and of the prefix ratio at the trained tokens "
        "<first> to 2 <first> - 1",
    ),
    "prefix_ratio/gap_abs_by_staleness/<steps>": Declaration(
        "nats",
        "mean",
        "Mean absolute difference between the logs of the surrogate and of the prefix ratio of the tokens with this "
        "staleness (16: 16 or more)",
    ),
    "objective/loss": Declaration("", "mean", "Mean value of the surrogate loss"),
    "objective/weight_mean": Declaration("", "mean", "Mean coefficient of the advantage (the weight) after clipping"),
    "objective/weight_square_mean": Declaration("", "mean", "Mean squared coefficient of the advantage after clipping"),
    "objective/effective_sample_size": Declaration(
        "share", "derived", "Effective sample size of the weights: (mean weight)^2 / mean squared weight"
    ),
    "objective/weight_by_position/<first>": Declaration(
        "", "mean", "Mean weight at the trained tokens <first> to 2 <first> - 1"
    ),
    "objective/weight_by_staleness/<steps>": Declaration(
        "", "mean", "Mean weight of the tokens with this staleness (16: 16 or more)"
    ),
    "objective/weight_square_by_position/<first>": Declaration(
        "", "mean", "Mean squared weight at the trained tokens <first> to 2 <first> - 1"
    ),
    "objective/weight_square_by_staleness/<steps>": Declaration(
        "", "mean", "Mean squared weight of the tokens with this staleness (16: 16 or more)"
    ),
    "objective/effective_sample_size_by_position/<first>": Declaration(
        "share", "derived", "Effective sample size of the weights at the trained tokens <first> to 2 <first> - 1"
    ),
    "objective/effective_sample_size_by_staleness/<steps>": Declaration(
        "share", "derived", "Effective sample size of the weights of the tokens with this staleness (16: 16 or more)"
    ),
    "objective/clipped_fraction": Declaration("share", "mean", "Share of response tokens whose weight was clipped"),
    "objective/masked_fraction": Declaration(
        "share", "mean", "Share of response tokens that the objective or a correction masked"
    ),
    "corrections/weight_mean": Declaration(
        "", "mean", "Mean factor by which the enabled corrections (loss.*) weigh the response tokens"
    ),
    "corrections/icepop_tokens": Declaration("share", "mean", "Share of response tokens that loss.icepop masked"),
    "corrections/decoupled_tokens": Declaration("share", "mean", "Share of response tokens that loss.decoupled masked"),
    "corrections/rejection_tokens": Declaration("share", "mean", "Share of response tokens that loss.rejection masked"),
    "corrections/rejection_sequences": Declaration("share", "mean", "Share of responses that loss.rejection masked"),
    "corrections/off_policy_masking_tokens": Declaration(
        "share", "mean", "Share of response tokens that loss.off_policy_masking masked"
    ),
    "corrections/off_policy_masking_sequences": Declaration(
        "share", "mean", "Share of responses that loss.off_policy_masking masked"
    ),
    "staleness/min": Declaration("global steps", "min", "Staleness of the freshest group of the batch"),
    "staleness/mean": Declaration(
        "global steps",
        "mean",
        "Mean staleness of the groups of the batch: the policy version at the update minus the group's oldest version",
    ),
    "staleness/max": Declaration("global steps", "max", "Staleness of the stalest group of the batch"),
    "response/length_mean": Declaration("tokens", "mean", "Mean length of the responses"),
    "response/length_by_prompt/<kind>": Declaration(
        "tokens",
        "mean",
        "Mean length of the responses, without a given prefix, to prompts with a prefix (prefixed) and without one "
        "(plain)",
    ),
    "response/length_max": Declaration("tokens", "max", "Length of the longest response"),
    "response/truncated_fraction": Declaration(
        "share", "mean", "Share of responses that were truncated at the length limit"
    ),
    "episode/turns": Declaration(
        "turns", "mean", "Mean number of the policy's turns per response, with an environment"
    ),
    "episode/given_fraction": Declaration(
        "share", "mean", "Share of the response tokens that the environment gave; no loss sees them"
    ),
    "episode/tool_calls": Declaration("calls", "mean", "Mean number of tool calls per response"),
    "episode/failed_turns": Declaration(
        "share", "mean", "Share of the environment's answers that report a failure, such as an error of a tool"
    ),
    "episode/answer_s": Declaration("s", "mean", "Mean time until the environment had answered a turn"),
    "episode/answer_s_max": Declaration("s", "max", "Longest time until the environment had answered a turn"),
    "optimizer/grad_norm": Declaration("", "mean", "Mean global gradient norm of the step's updates, before clipping"),
    "optimizer/grad_norm_max": Declaration(
        "", "max", "Largest global gradient norm of the step's updates, before clipping"
    ),
    "optimizer/learning_rate": Declaration("", "max", "Largest learning rate of the step's updates"),
    "optimizer/learning_rate_factor": Declaration(
        "",
        "mean",
        "Mean factor of the scheduled learning rate: that of optimizer.scale_by_effective_sample_size, or of an "
        "objective that scales it",
    ),
    "optimizer/skipped_updates": Declaration(
        "updates",
        "sum",
        "Number of updates that were skipped because the gradient was not finite or no token was trained",
    ),
    "mismatch/log_prob_abs_mean": Declaration(
        "nats", "mean", "Mean absolute difference between the behavior log-prob and the server's log-prob of a token"
    ),
    "mismatch/log_prob_abs_max": Declaration(
        "nats", "max", "Largest absolute difference between the behavior log-prob and the server's log-prob of a token"
    ),
    "mismatch/kl_k3": Declaration(
        "nats", "mean", "k3 estimate of KL(server || trainer) per token under the same weights"
    ),
    "batch/tokens": Declaration("tokens", "sum", "Number of prompt and response tokens of the step's batch"),
    "batch/padding_fraction": Declaration("share", "mean", "Share of the computed tokens that are padding"),
    "batch/imbalance": Declaration(
        "share", "mean", "Work of the busiest data-parallel rank above the mean of all ranks, as a share of the mean"
    ),
    "time/wait_for_batch_s": Declaration("s", "max", "Time for which the trainer waited for rollouts and evaluations"),
    "time/score_s": Declaration(
        "s", "max", "Time of the scoring pass that computes the behavior log-probs of a coming batch"
    ),
    "time/turn_s": Declaration(
        "s", "max", "Shared GPUs: time of releasing the servers' memory and taking the trainer's states from the host"
    ),
    "time/train_s": Declaration("s", "max", "Time of forward and backward passes and optimizer updates"),
    "time/publish_s": Declaration("s", "max", "Time of sending the weights to the servers and verifying them"),
    "time/checkpoint_s": Declaration("s", "max", "Time for which the checkpoint before the step delayed training"),
    "time/monitor_s": Declaration("s", "max", "Time of writing the metrics of the previous step"),
    "time/step_s": Declaration("s", "max", "Time of the entire global step"),
    "overlap/trainer_wait_share": Declaration(
        "share", "derived", "Share of the step for which the trainer waited for a batch"
    ),
    "overlap/server_idle_share": Declaration(
        "share", "mean", "Share of the servers' time since the last step in which they had no group"
    ),
    "fleet/members": Declaration("servers", "mean", "Number of servers that respond"),
    "fleet/current": Declaration("servers", "mean", "Number of servers that have the current weights and get work"),
    "fleet/outdated": Declaration(
        "servers", "mean", "Number of servers that respond without the current weights and get no work"
    ),
    "fleet/slow": Declaration(
        "servers", "mean", "Number of servers that are much slower than the median and get work last"
    ),
    "fleet/groups_in_flight": Declaration(
        "groups", "mean", "Number of groups in progress at the publication of the weights"
    ),
    "fleet/groups_waiting": Declaration(
        "groups", "mean", "Number of groups that waited for a server at the publication of the weights"
    ),
    "fleet/idle_s": Declaration(
        "s", "sum", "Time since the start in which servers had no group, summed over the servers"
    ),
    "fleet/groups": Declaration("groups", "sum", "Number of groups sampled since the start, including held-out ones"),
    "fleet/retries": Declaration("groups", "sum", "Number of groups requested again after a failure, since the start"),
    "fleet/moved_groups": Declaration(
        "groups", "sum", "Number of groups moved away from a server that ended, since the start"
    ),
    "fleet/restarts": Declaration(
        "servers", "sum", "Number of times since the start that a server returned after a restart or lost its weights"
    ),
    "fleet/hung": Declaration(
        "servers", "sum", "Number of restarts since the start of servers that responded but generated nothing"
    ),
    "fleet/out_of_files": Declaration(
        "requests",
        "sum",
        "Number of requests since the start that could not be sent because the collector had too many open files",
    ),
    "fleet/tokens/<server>": Declaration("tokens", "sum", "Number of tokens sampled by a server since the start"),
    "fleet/tokens_per_s/<server>": Declaration("tokens/s", "mean", "Mean rate of one response on a server"),
    "fleet/failed_evaluations": Declaration(
        "evaluations", "sum", "Number of evaluations given up since the start because groups failed"
    ),
    "fleet/failures/<kind>": Declaration(
        "requests", "sum", "Number of failed requests since the start, by kind of failure"
    ),
    "fleet/invalid_answers/<kind>": Declaration(
        "answers",
        "sum",
        "Number of invalid answers of servers since the start, by kind; they are refused and not trained on",
    ),
    "publish/paused_s": Declaration(
        "s", "max", "Time for which servers paused while the weights changed under requests in flight"
    ),
    "publish/bytes_per_s": Declaration(
        "bytes/s",
        "mean",
        "Rate of the publication: bytes of the weights / time from the first byte sent to the last byte received by "
        "the last server",
    ),
    "publish/servers": Declaration(
        "servers", "sum", "Number of servers that have the new policy version, verified by checksums"
    ),
    "publish/failures": Declaration(
        "servers", "sum", "Number of servers of the lease that do not have the new policy version and get no work"
    ),
    "publish/fallbacks": Declaration(
        "publications",
        "sum",
        "Number of publications that the servers loaded from disk because publish.transport had failed",
    ),
    "publish/canary_abs_mean": Declaration(
        "nats",
        "mean",
        "Mean absolute difference between the trainer's and the servers' log-probs of the canaries' tokens",
    ),
    "publish/canary_server_max": Declaration(
        "nats",
        "max",
        "Largest mean absolute difference between the trainer's and one server's log-probs of the canaries' tokens",
    ),
    "publish/canary_abs_max": Declaration(
        "nats", "max", "Largest absolute difference between the trainer's and any server's log-prob of a canary's token"
    ),
    "throughput/response_tokens_per_s": Declaration(
        "tokens/s", "mean", "Response tokens of the batch / time of the step"
    ),
    "throughput/trained_tokens_per_s": Declaration("tokens/s", "mean", "Tokens of the batch / training time"),
    "throughput/trained_tokens_per_s_per_gpu": Declaration(
        "tokens/s", "mean", "Tokens of the batch / training time / number of ranks"
    ),
    "throughput/tflops_per_gpu": Declaration(
        "TFLOP/s",
        "mean",
        "Floating-point operations of the batch's forward and backward passes / training time / number of ranks",
    ),
    "throughput/mfu": Declaration(
        "share", "mean", "Model FLOPs utilization: share of the GPU's dense bfloat16 peak, if the peak is known"
    ),
    "memory/gpu_allocated_bytes": Declaration(
        "bytes", "max", "Peak memory that tensors occupied on a GPU during the step"
    ),
    "memory/gpu_reserved_bytes": Declaration(
        "bytes", "max", "Peak memory that PyTorch reserved on a GPU during the step"
    ),
    "memory/host_bytes/<role>": Declaration("bytes", "sum", "Resident memory of a role's processes on all machines"),
    "alarms/raised": Declaration("alarms", "sum", "Number of alarms since the run's start"),
    "alarms/raised_by_kind/<alarm>": Declaration("alarms", "sum", "Number of alarms of one kind since the run's start"),
    "eval/pass_at_1": Declaration("share", "mean", "Held-out accuracy: share of correct samples"),
    "eval/mean_reward": Declaration("", "mean", "Mean reward of the held-out responses"),
    "eval/not_graded": Declaration(
        "responses",
        "sum",
        "Number of held-out responses that could not be graded; they count as wrong, with a reward of 0 or the lowest "
        "reward, whichever is lower",
    ),
    "eval/standard_error": Declaration("share", "mean", "Standard error of the held-out pass@1 over prompts"),
    "eval/response_length_mean": Declaration("tokens", "mean", "Mean length of the held-out responses"),
    "evaluation/accuracy/<benchmark>": Declaration(
        "share", "mean", "Share of correct samples of a benchmark; average is the mean over the benchmarks"
    ),
    "evaluation/standard_error/<benchmark>": Declaration(
        "share", "mean", "Standard error of a benchmark's accuracy over prompts"
    ),
    "evaluation/mean_reward/<benchmark>": Declaration("", "mean", "Mean reward of the responses of a benchmark"),
    "evaluation/not_graded/<benchmark>": Declaration(
        "responses",
        "sum",
        "Number of responses of a benchmark that could not be graded; they count as wrong, with a reward of 0 or the "
        "lowest reward, whichever is lower",
    ),
    "evaluation/pass_at_k/<benchmark>_<k>": Declaration(
        "share", "mean", "Share of a benchmark's prompts with at least one correct response among k samples"
    ),
    "evaluation/majority_at_k/<benchmark>_<k>": Declaration(
        "share", "mean", "Share of a benchmark's prompts whose most frequent answer among k samples is correct"
    ),
    "evaluation/response_length_mean/<benchmark>": Declaration(
        "tokens", "mean", "Mean length of the responses of a benchmark"
    ),
    "evaluation/truncated_fraction/<benchmark>": Declaration(
        "share", "mean", "Share of a benchmark's responses that were truncated at the length limit"
    ),
}


def check_declared(names: Iterable[str]) -> None:
    """Raises ValueError if a name is not in METRICS: an undeclared scalar has no unit and no meaning."""
    families = {name.partition("<")[0] for name in METRICS if "<" in name}
    unknown = sorted(name for name in set(names) - METRICS.keys() if name.rpartition("/")[0] + "/" not in families)
    if unknown:
        raise ValueError(f"undeclared metrics {', '.join(unknown)}: declare them in METRICS of {__name__}")


def metric_table() -> str:
    """METRICS as a Markdown table, for docs/reference/metrics.md."""
    lines = ["| metric | unit | reduction | description |", "|---|---|---|---|"]
    for name, declaration in METRICS.items():
        description = declaration.description.replace("|", "\\|")
        lines.append(f"| `{name}` | {declaration.unit} | {declaration.reduction} | {description} |")
    return "\n".join(lines) + "\n"
