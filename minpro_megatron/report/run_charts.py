"""A run's charts, by section: each turns the run's history into a picture, if the history has its numbers."""

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
    "time/monitor_s": ("metrics", PURPLE),
}


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with its heading and a sentence on how to read it."""

    section: str
    title: str
    caption: str
    svg: Markup


def charts(history: Sequence[Entry]) -> list[Chart]:
    """Every chart that the history has numbers for, in reading order."""
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
    """Mean, the band from 1 % to 99 % of the tokens, and what lies farthest out."""

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
        "Share of right responses (collector.right_reward). Rollouts lag behind the policy; held-out points are of "
        "that policy version (bars: one standard error).",
        _accuracy,
    ),
    (
        REWARD,
        "Mean reward",
        "As the grader gives it. Rollouts lag behind the policy; held-out points are of that policy version.",
        _mean_reward,
    ),
    (REWARD, "Benchmarks", "Right samples, by policy version.", of_family("evaluation/accuracy/", "", "share")),
    (
        REWARD,
        "By kind of prompt",
        "Accuracy of training rollouts with a given prefix and without.",
        of_family("reward/accuracy_by_prompt/", "", "share", least=2),
    ),
    (
        REWARD,
        "Samples without a lesson",
        "Groups with equal rewards give no gradient; cut responses were graded unfinished.",
        lines(
            Line("reward/equal_groups", "groups with equal rewards", PURPLE, True),
            Line("response/truncated_fraction", "responses cut at the limit", ORANGE, True),
            kind="share",
        ),
    ),
    (
        REWARD,
        "Not graded",
        "Responses whose grade failed twice, since the start of the collector; groups with one are not trained on.",
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
        "Tokens, the stop token included.",
        lines(
            Line("response/length_mean", "mean", BLUE, True), Line("response/length_max", "longest", GREY),
            unit="tokens",
        ),
    ),
    (
        DRIFT,
        "Importance ratio",
        "Current over behavior policy, per token. Its spread is the off-policy drift.",
        _band("ratio", BLUE, "log"),
    ),
    (
        DRIFT,
        "Prefix minimum",
        "The smallest ratio among a token's predecessors, which weighs the token.",
        _band("prefix_min", GREEN, "log"),
    ),
    (DRIFT, "Staleness", "Policy version minus the version that sampled the batch.", _staleness),
    (
        DRIFT,
        "Cumulative ratio and its surrogate",
        "Logs of the product of the ratios up to a token, and of what MinPRO puts in its place.",
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
        "Mean absolute difference of the logs, at trained tokens from the one named to twice as far.",
        of_family("prefix_ratio/gap_abs_by_position/", "from ", unit="nats"),
    ),
    (
        DRIFT,
        "KL from the sampling policy",
        "Three estimates of it, per response token.",
        lines(
            Line("policy/kl_k1", "k1", BLUE), Line("policy/kl_k2", "k2", ORANGE), Line("policy/kl_k3", "k3", GREEN),
            kind="free", unit="nats",
        ),
    ),
    (
        DRIFT,
        "Trainer and server",
        "Difference of their log-probs under the same weights: engine mismatch, not drift.",
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
            Line("objective/masked_fraction", "left out", RED),
            kind="share",
        ),
    ),
    (
        OBJECTIVE,
        "Effective sample size",
        "Squared mean over mean square: the share of tokens that would do with equal weights.",
        lines(
            Line("objective/effective_sample_size", "of the weights", BLUE),
            Line("ratio/effective_sample_size", "of the ratios", GREY),
            kind="share",
        ),
    ),
    (
        OBJECTIVE,
        "Weight of the advantage",
        "Mean coefficient after clipping.",
        lines(Line("objective/weight_mean", "weight", BLUE), kind="free", at=1.0),
    ),
    (
        OBJECTIVE,
        "Weight by position",
        "Mean weight at trained tokens from the one named to twice as far.",
        of_family("objective/weight_by_position/", "from ", "free"),
    ),
    (
        OBJECTIVE,
        "Weight by staleness",
        "Mean weight of tokens that many global steps stale.",
        of_family("objective/weight_by_staleness/", "", "free"),
    ),
    (
        OPTIMISATION,
        "Gradient norm",
        "Of an update, before clipping.",
        lines(
            Line("optimizer/grad_norm_max", "largest", GREY), Line("optimizer/grad_norm", "mean", BLUE, True),
            kind="wide",
        ),
    ),
    (
        OPTIMISATION,
        "Entropy",
        "Mean over response tokens. A collapse towards 0 ends exploration.",
        lines(Line("policy/entropy", "entropy", PURPLE, True), unit="nats"),
    ),
    (
        OPTIMISATION,
        "Loss",
        "The surrogate's value. It need not fall: the policy that it is measured against moves.",
        lines(Line("objective/loss", "loss", BLUE, True), kind="free"),
    ),
    (
        OPTIMISATION,
        "Learning rate",
        "The largest of the step's updates.",
        lines(Line("optimizer/learning_rate", "learning rate", BLUE)),
    ),
    (
        OPTIMISATION,
        "Skipped updates",
        "Their gradient was not finite, or no token was trained.",
        lines(Line("optimizer/skipped_updates", "updates", RED), kind="counts"),
    ),
    (THROUGHPUT, "Time per step", "Where a global step's seconds go.", _phases),
    (
        THROUGHPUT,
        "Throughput",
        "Response tokens as rollouts deliver them, all tokens as training consumes them.",
        lines(
            Line("throughput/response_tokens_per_s", "response tokens, whole step", ORANGE, True),
            Line("throughput/trained_tokens_per_s", "all tokens, training", BLUE, True),
            unit="tokens/s",
        ),
    ),
    (
        THROUGHPUT,
        "Who waits",
        "Shares of the trainer's and of the servers' time.",
        lines(
            Line("overlap/trainer_wait_share", "trainer waits for rollouts", BLUE, True),
            Line("overlap/server_idle_share", "servers without a group", ORANGE, True),
            kind="share",
        ),
    ),
    (
        THROUGHPUT,
        "Computation",
        "Model operations of training a second and rank.",
        lines(Line("throughput/tflops_per_gpu", "TFLOP/s", GREEN, True), unit="TFLOP/s"),
    ),
    (
        THROUGHPUT,
        "Rows",
        "Padding in them, and work of the busiest data-parallel rank above the mean.",
        lines(
            Line("batch/padding_fraction", "padding", GREY, True), Line("batch/imbalance", "imbalance", RED, True),
            kind="share",
        ),
    ),
    (
        FLEET,
        "Servers",
        "Those that answer, and those of them that hold the current weights.",
        lines(
            Line("fleet/members", "answer", BLUE),
            Line("fleet/current", "hold the current weights", GREEN),
            Line("fleet/slow", "slow", ORANGE),
        ),
    ),
    (
        FLEET,
        "Groups",
        "Under way, and waiting for a server, when weights were published.",
        lines(
            Line("fleet/groups_in_flight", "under way", BLUE), Line("fleet/groups_waiting", "waiting", ORANGE),
            kind="counts",
        ),
    ),
    (
        FLEET,
        "Speed of a response",
        "By server; a server far below the others holds its groups up.",
        of_family("fleet/tokens_per_s/", "server ", unit="tokens/s"),
    ),
    (
        FLEET,
        "Trouble",
        "Since the start.",
        lines(
            Line("fleet/retries", "groups asked for again", ORANGE),
            Line("fleet/moved_groups", "groups moved", BLUE),
            Line("fleet/restarts", "servers come back", RED),
            kind="counts",
        ),
    ),
    (
        FLEET,
        "Publication",
        "The trainer's time for it, and how long servers with requests under way were paused.",
        lines(
            Line("time/publish_s", "publish", ORANGE), Line("publish/paused_s", "paused", GREY), unit="seconds"
        ),
    ),
]  # fmt: skip
