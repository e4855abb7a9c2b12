"""A run's charts by section; a chart is drawn if the run's history has its metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from minpro_megatron.monitor.history import Entry
from minpro_megatron.report import figures
from minpro_megatron.report.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    TEAL,
    Draw,
    Line,
    dressed,
    lines,
    of_family,
)

_PHASES = {
    "time/wait_for_batch_s": ("wait for rollouts", GREY),
    "time/train_s": ("train", BLUE),
    "time/score_s": ("score", GREEN),
    "time/publish_s": ("publish", ORANGE),
    "time/checkpoint_s": ("checkpoint", RED),
    "time/turn_s": ("turn", TEAL),
    "time/monitor_s": ("metrics", PURPLE),
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its heading and a sentence on how to read it."""

    section: str
    title: str
    caption: str
    svg: Markup


def charts(history: Sequence[Entry]) -> list[Chart]:
    """Every chart for which the history has values, in the order of the page."""
    made = []
    with figures.drawing():
        for section, title, caption, draw in CHARTS:
            svg = figures.picture(lambda axes, draw=draw: draw(axes, history))
            if svg is not None:
                made.append(Chart(section, title, caption, svg))
    return made


def _mean_reward(axes: Axes, history: Sequence[Entry]) -> bool:
    trained, evaluated = figures.series(history, "reward/mean"), figures.series(history, "eval/mean_reward")
    figures.line(axes, trained, BLUE, "mean reward of training rollouts", smoothed=True)
    if evaluated:
        axes.plot(evaluated.steps, evaluated.values, "o", color=ORANGE, label="held-out mean reward")
    return dressed(axes, [trained, evaluated], "free")


def _accuracy(axes: Axes, history: Sequence[Entry]) -> bool:
    accuracy = figures.series(history, "reward/accuracy")
    evaluated, errors = figures.series(history, "eval/pass_at_1"), figures.series(history, "eval/standard_error")
    figures.line(axes, accuracy, BLUE, "accuracy of training rollouts", smoothed=True)
    if evaluated:
        by_version = dict(zip(errors.steps, errors.values, strict=True))
        spread = [by_version.get(step, 0.0) for step in evaluated.steps]
        axes.errorbar(
            evaluated.steps, evaluated.values, spread, fmt="o", color=ORANGE, capsize=3, label="held-out pass@1"
        )
    return dressed(axes, [accuracy, evaluated], "share")


def _band(area: str, color: str, kind: str, unit: str = "") -> Draw:
    """Mean, the band from the 1 % to the 99 % quantile of the tokens, minimum and maximum."""

    def draw(axes: Axes, history: Sequence[Entry]) -> bool:
        names = ("mean", "quantile_50", "quantile_01", "quantile_99", "min", "max")
        average, median, low, high, least, most = (figures.series(history, f"{area}/{name}") for name in names)
        if low and high and low.steps == high.steps:
            axes.fill_between(
                low.steps, low.values, high.values, color=color, alpha=0.18, linewidth=0, label="1 % to 99 %"
            )
        figures.line(axes, average, color, "mean")
        figures.line(axes, median, TEAL, "median")
        figures.line(axes, least, GREY, "smallest")
        figures.line(axes, most, ORANGE, "largest")
        return dressed(axes, [average, low, high, least, most], kind, unit, at=1.0)

    return draw


def _staleness(axes: Axes, history: Sequence[Entry]) -> bool:
    average = figures.series(history, "staleness/mean")
    low, high = figures.series(history, "staleness/min"), figures.series(history, "staleness/max")
    if low and high and low.steps == high.steps:
        axes.fill_between(low.steps, low.values, high.values, step="mid", color=PURPLE, alpha=0.15, linewidth=0)
    if average:
        axes.step(average.steps, average.values, where="mid", color=PURPLE, label="mean")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return dressed(axes, [average], "zero", "global steps")


def _phases(axes: Axes, history: Sequence[Entry]) -> bool:
    entries = [entry for entry in history if "time/step_s" in entry.metrics]
    if not entries:
        return False
    used = {name: how for name, how in _PHASES.items() if any(entry.metrics.get(name) for entry in entries)}
    parts = [[entry.metrics.get(name, 0.0) for entry in entries] for name in used]
    known = [sum(part[place] for part in parts) for place in range(len(entries))]
    rest = [max(entry.metrics["time/step_s"] - spent, 0.0) for entry, spent in zip(entries, known, strict=True)]
    steps = [entry.step for entry in entries]
    labels, colors = [label for label, _ in used.values()], [color for _, color in used.values()]
    axes.stackplot(steps, *parts, rest, labels=[*labels, "other"], colors=[*colors, PALE], alpha=0.85, linewidth=0)
    return dressed(axes, [figures.series(history, "time/step_s")], "zero", "seconds")


REWARD, DRIFT, OBJECTIVE, OPTIMISATION, THROUGHPUT, FLEET = (
    "Reward", "Off-policyness", "Objective", "Optimisation", "Throughput", "Servers",
)  # fmt: skip

CHARTS: list[tuple[str, str, str, Draw]] = [
    (
        REWARD,
        "Accuracy",
        "Share of correct responses (reward.right_reward). Rollouts were sampled by earlier policy versions; "
        "held-out points are of this policy version (bars: one standard error).",
        _accuracy,
    ),
    (
        REWARD,
        "Mean reward",
        "Rewards of the grader. Rollouts were sampled by earlier policy versions; held-out points are of this version.",
        _mean_reward,
    ),
    (REWARD, "Benchmarks", "Share of correct samples.", of_family("evaluation/accuracy/", "", "share")),
    (
        REWARD,
        "By kind of prompt",
        "Accuracy of training rollouts for prompts with and without a given prefix.",
        of_family("reward/accuracy_by_prompt/", "", "share", minimum=2),
    ),
    (
        REWARD,
        "Uninformative samples",
        "Groups with equal rewards give no gradient; truncated responses were graded although they are incomplete.",
        lines(
            Line("reward/equal_groups", "groups with equal rewards", PURPLE, True),
            Line("response/truncated_fraction", "truncated responses", ORANGE, True),
            kind="share",
        ),
    ),
    (
        REWARD,
        "Not graded",
        "Responses that failed to be graded twice, since the start of the collector; their groups are excluded.",
        lines(
            Line("reward/grader_failed", "grader failed", RED),
            Line("reward/grader_timed_out", "grader exceeded its time", ORANGE),
            kind="counts",
            unit="responses",
        ),
    ),
    (
        REWARD,
        "Response length",
        "Number of tokens, including the stop token.",
        lines(
            Line("response/length_mean", "mean", BLUE, True), Line("response/length_max", "longest", GREY),
            unit="tokens",
        ),
    ),
    (
        DRIFT,
        "Importance ratio",
        "Current policy over behavior policy, per token. The spread shows the off-policy drift.",
        _band("ratio", BLUE, "log"),
    ),
    (
        DRIFT,
        "Prefix minimum",
        "The smallest ratio of the tokens before a token, with which MinPRO weights the token.",
        _band("prefix_min", GREEN, "log"),
    ),
    (DRIFT, "Staleness", "Policy version at the update minus the version that sampled the batch.", _staleness),
    (
        DRIFT,
        "Cumulative ratio and its surrogate",
        "Log of the product of the ratios up to a token, and log of MinPRO's surrogate for it.",
        lines(
            Line("prefix_ratio/log_mean", "product", BLUE),
            Line("prefix_ratio/surrogate_log_mean", "surrogate", GREEN),
            Line("prefix_ratio/gap_abs_mean", "mean difference", ORANGE),
            kind="free", unit="nats", at=0.0,
        ),
    ),
    (
        DRIFT,
        "Surrogate's error by position",
        "Mean absolute difference of the logs for the trained tokens from the labeled position to twice that position.",
        of_family("prefix_ratio/gap_abs_by_position/", "from ", unit="nats"),
    ),
    (
        DRIFT,
        "KL from the sampling policy",
        "Three estimates of the KL divergence per response token.",
        lines(
            Line("policy/kl_k1", "k1", BLUE), Line("policy/kl_k2", "k2", ORANGE), Line("policy/kl_k3", "k3", GREEN),
            kind="free", unit="nats",
        ),
    ),
    (
        DRIFT,
        "Trainer and server",
        "Difference between their log-probs under the same weights: engine mismatch, not drift.",
        lines(
            Line("mismatch/log_prob_abs_max", "largest difference", GREY),
            Line("mismatch/log_prob_abs_mean", "mean difference", BLUE),
            Line("mismatch/kl_k3", "KL (k3)", ORANGE),
            kind="log", unit="nats",
        ),
    ),
    (
        OBJECTIVE,
        "Tokens affected",
        "Shares of response tokens.",
        lines(
            Line("prefix_min/below_one", "prefix minimum below 1", GREEN),
            Line("objective/clipped_fraction", "weight clipped", ORANGE),
            Line("objective/masked_fraction", "masked", RED),
            kind="share",
        ),
    ),
    (
        OBJECTIVE,
        "Masked by corrections",
        "Shares of response tokens that the enabled corrections masked.",
        lines(
            Line("corrections/rejection_tokens", "rejection", RED),
            Line("corrections/off_policy_masking_tokens", "off-policy masking", ORANGE),
            Line("corrections/icepop_tokens", "IcePop", BLUE),
            Line("corrections/decoupled_tokens", "decoupled", GREEN),
            kind="share",
        ),
    ),
    (
        OBJECTIVE,
        "Effective sample size",
        "Squared mean over mean square: the share of the tokens that would suffice if all had the same weight.",
        lines(
            Line("objective/effective_sample_size", "of the weights", BLUE),
            Line("ratio/effective_sample_size", "of the ratios", GREY),
            Line("ratio/sequence_effective_sample_size", "of the responses' ratios", GREEN),
            kind="share",
        ),
    ),
    (
        OBJECTIVE,
        "Weight of the advantage",
        "Mean coefficient of the advantage after clipping.",
        lines(Line("objective/weight_mean", "weight", BLUE), kind="free", at=1.0),
    ),
    (
        OBJECTIVE,
        "Weight by position",
        "Mean weight of the trained tokens from the labeled position to twice that position.",
        of_family("objective/weight_by_position/", "from ", "free"),
    ),
    (
        OBJECTIVE,
        "Weight by staleness",
        "Mean weight of the tokens with this staleness in global steps.",
        of_family("objective/weight_by_staleness/", "", "free"),
    ),
    (
        OPTIMISATION,
        "Gradient norm",
        "Global gradient norm of an update, before clipping.",
        lines(
            Line("optimizer/grad_norm_max", "largest", GREY), Line("optimizer/grad_norm", "mean", BLUE, True),
            kind="wide",
        ),
    ),
    (
        OPTIMISATION,
        "Entropy",
        "Mean over response tokens. If it collapses toward 0, exploration ends.",
        lines(Line("policy/entropy", "entropy", PURPLE, True), unit="nats"),
    ),
    (
        OPTIMISATION,
        "Loss",
        "Value of the surrogate loss. It need not decrease, because the behavior policy changes.",
        lines(Line("objective/loss", "loss", BLUE, True), kind="free"),
    ),
    (
        OPTIMISATION,
        "Learning rate",
        "Largest learning rate of the step's updates.",
        lines(Line("optimizer/learning_rate", "learning rate", BLUE)),
    ),
    (
        OPTIMISATION,
        "Skipped updates",
        "Updates without a finite gradient or without a trained token.",
        lines(Line("optimizer/skipped_updates", "updates", RED), kind="counts"),
    ),
    (THROUGHPUT, "Time per step", "Time of a global step by phase.", _phases),
    (
        THROUGHPUT,
        "Throughput",
        "Response tokens per second of the step, and all tokens per second of training.",
        lines(
            Line("throughput/response_tokens_per_s", "response tokens, entire step", ORANGE, True),
            Line("throughput/trained_tokens_per_s", "all tokens, training", BLUE, True),
            unit="tokens/s",
        ),
    ),
    (
        THROUGHPUT,
        "Idle shares",
        "Shares of the trainer's and the servers' time in which they wait.",
        lines(
            Line("overlap/trainer_wait_share", "trainer waits for rollouts", BLUE, True),
            Line("overlap/server_idle_share", "servers without a group", ORANGE, True),
            kind="share",
        ),
    ),
    (
        THROUGHPUT,
        "Computation",
        "Floating-point operations of training per second and rank.",
        lines(Line("throughput/tflops_per_gpu", "TFLOP/s", GREEN, True), unit="TFLOP/s"),
    ),
    (
        THROUGHPUT,
        "Rows",
        "Share of padding in packed rows, and work of the busiest data-parallel rank above the mean.",
        lines(
            Line("batch/padding_fraction", "padding", GREY, True), Line("batch/imbalance", "imbalance", RED, True),
            kind="share",
        ),
    ),
    (
        FLEET,
        "Servers",
        "Servers that respond, and those that have the current weights.",
        lines(
            Line("fleet/members", "respond", BLUE),
            Line("fleet/current", "have the current weights", GREEN),
            Line("fleet/slow", "slow", ORANGE),
        ),
    ),
    (
        FLEET,
        "Groups",
        "Groups in progress and groups waiting for a server when weights were published.",
        lines(
            Line("fleet/groups_in_flight", "in progress", BLUE), Line("fleet/groups_waiting", "waiting", ORANGE),
            kind="counts",
        ),
    ),
    (
        FLEET,
        "Speed of a response",
        "Tokens per second of one response, by server; a slow server delays its groups.",
        of_family("fleet/tokens_per_s/", "server ", unit="tokens/s"),
    ),
    (
        FLEET,
        "Failures",
        "Counts since the start.",
        lines(
            Line("fleet/retries", "groups retried", ORANGE),
            Line("fleet/moved_groups", "groups moved", BLUE),
            Line("fleet/restarts", "server restarts", RED),
            kind="counts",
        ),
    ),
    (
        FLEET,
        "Publication",
        "Time of the trainer, and time for which servers with requests in flight were paused.",
        lines(
            Line("time/publish_s", "publish", ORANGE), Line("publish/paused_s", "paused", GREY), unit="seconds"
        ),
    ),
]  # fmt: skip
