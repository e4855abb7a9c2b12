"""The alarms of a run: checks that are pure functions of the history of its metrics.

A check examines the steps so far and describes what is wrong at the last one, if anything is. An alarm is raised when
its check first finds something, and again only after the check has found nothing for `window_steps`. All of this
follows from the metrics, so a run that resumes after a crash knows from metrics.jsonl which alarms were raised before.
"""

import itertools
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from minpro_megatron.config.alarms import AlarmName, AlarmsConfig
from minpro_megatron.errors import ProjectError

MIN_RISE_NATS = 0.3  # smallest rise of the entropy that counts as an explosion
MIN_REWARD_DROP = 0.03  # as a share of the rewards' range: the mean of a few hundred responses varies by this much
NUM_SPIKES = 3  # within the window, or all steps of a shorter window: clipping handles a single spike
MAX_STEPS_BEFORE_A_SPIKE = 20  # the median of their gradient norms is the usual norm
MUST_BE_FINITE = ("objective/loss", "policy/entropy", "ratio/mean", "optimizer/grad_norm")


class AlarmStop(ProjectError):
    """The run ends because of an alarm of alarms.stop_on."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """`seen` describes what the metrics show, `remedy` what to try."""

    step: int
    name: AlarmName
    seen: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name} at global step {self.step}: {self.seen}; {self.remedy}"


@dataclass(frozen=True)
class Limits:
    """The thresholds of the checks."""

    settings: AlarmsConfig
    max_staleness: int | None = None  # None: mode delay, in which the staleness is fixed


class Series:
    """The watched metrics of the global steps so far, in order, and their running means over `window` steps, where all
    of these steps have finite values."""

    def __init__(self, window: int) -> None:
        self.num_steps = 0
        self._window = window
        self._values: dict[str, list[float | None]] = {name: [] for name in WATCHED}
        self._averages: dict[str, list[float]] = {name: [] for name in WATCHED}

    def add(self, metrics: Mapping[str, float]) -> None:
        self.num_steps += 1
        for name, values in self._values.items():
            values.append(metrics.get(name))
            if len(recent := self.last(name, self._window)) == self._window:
                self._averages[name].append(fmean(recent))

    def complete(self, metrics: Mapping[str, float]) -> None:
        """Adds metrics of the last step that it did not have."""
        for name in metrics.keys() & self._values.keys():
            assert self._values[name][-1] is None, f"the step has {name} already"
            self._values[name][-1] = metrics[name]
            if len(recent := self.last(name, self._window)) == self._window:
                self._averages[name].append(fmean(recent))

    def last(self, name: str, count: int) -> list[float]:
        """The finite values of the last `count` steps; fewer at the beginning."""
        return [value for value in self._values[name][-count:] if value is not None and math.isfinite(value)]

    def at_end(self, name: str) -> float | None:
        """The value of the last step, finite or not; None if the step has none."""
        return self._values[name][-1]

    def averages(self, name: str) -> list[float]:
        return self._averages[name]


# Returns what is wrong at the last step of the series, or None.
Check = Callable[[Series, Limits], str | None]


def _not_finite(series: Series, limits: Limits) -> str | None:
    values = {name: series.at_end(name) for name in MUST_BE_FINITE}
    broken = [name for name, value in values.items() if value is not None and not math.isfinite(value)]
    return f"{', '.join(broken)}: not finite" if broken else None


def _average_beyond(metric: str, setting: str, side: Literal["above", "below"], unit: str = "") -> Check:
    """A check of whether the window's average of `metric` is on this side of alarms.`setting`."""
    is_beyond = operator.gt if side == "above" else operator.lt

    def check(series: Series, limits: Limits) -> str | None:
        limit: float | None = getattr(limits.settings, setting)
        averages = series.averages(metric)
        if limit is None or not averages or not is_beyond(averages[-1], limit):
            return None
        return f"{metric} {averages[-1]:.3g}{unit} is {side} alarms.{setting} = {limit:g}"

    return check


def _entropy_explosion(series: Series, limits: Limits) -> str | None:
    factor = limits.settings.entropy_explosion_factor
    averages = series.averages("policy/entropy")
    if factor is None or not averages:
        return None
    now, least = averages[-1], min(averages)
    if now <= factor * least or now <= least + MIN_RISE_NATS:
        return None
    times = f"alarms.entropy_explosion_factor = {factor:g} times"
    return f"policy/entropy {now:.3g} nats is above {times} its least, {least:.3g}"


def _reward_drop(series: Series, limits: Limits) -> str | None:
    """Rewards have any scale, so the peak is measured from the lowest reward so far, and the fall by the range."""
    share = limits.settings.reward_drop
    averages = series.averages("reward/mean")
    lows, highs = (series.last(name, series.num_steps) for name in ("reward/min", "reward/max"))
    if share is None or not averages or not lows or not highs:
        return None
    now, peak, low, high = averages[-1], max(averages), min(lows), max(highs)
    fall = peak - now
    if fall <= share * (peak - low) or fall <= MIN_REWARD_DROP * (high - low):
        return None
    return (
        f"reward/mean {now:.3f} is {100 * fall / (peak - low):.0f} % below its peak of {peak:.3f}, measured from the "
        f"lowest reward, {low:g} (alarms.reward_drop = {share:g})"
    )


def _no_gradient(series: Series, limits: Limits) -> str | None:
    share, window = limits.settings.equal_groups, limits.settings.window_steps
    equal = series.last("reward/equal_groups", window)
    if share is None or len(equal) < window or min(equal) < share:
        return None
    return f"in each of {window} steps at least {100 * min(equal):.0f} % of the groups had equal rewards: no gradient"


def _failed_grades(series: Series, limits: Limits) -> str | None:
    limit, window = limits.settings.failed_grades, limits.settings.window_steps
    failed, late = (_new(series, name, window) for name in ("reward/grader_failed", "reward/grader_timed_out"))
    if limit is None or failed + late < limit:
        return None
    return (
        f"{failed + late:.0f} responses of the last {window} steps could not be graded: the grader failed for "
        f"{failed:.0f} and exceeded its time for {late:.0f}"
    )


def _new(series: Series, name: str, steps: int) -> float:
    """The increase of a count since the start over the last steps. A restarted collector counts from 0."""
    counts = [0.0, *series.last(name, series.num_steps)][-steps - 1 :]
    return sum(after - before if after >= before else after for before, after in itertools.pairwise(counts))


def _gradient_spikes(series: Series, limits: Limits) -> str | None:
    factor, window = limits.settings.gradient_spike_factor, limits.settings.window_steps
    if factor is None:
        return None
    # a step whose groups all have equal rewards has a gradient norm of 0
    norms = [norm for norm in series.last("optimizer/grad_norm", window + MAX_STEPS_BEFORE_A_SPIKE) if norm > 0]
    spikes = []
    for place in range(max(window // 2, len(norms) - window), len(norms)):
        usual = median(norms[max(0, place - MAX_STEPS_BEFORE_A_SPIKE) : place])
        if norms[place] > factor * usual:
            spikes.append(norms[place] / usual)
    if len(spikes) < min(NUM_SPIKES, window):
        return None
    return (
        f"optimizer/grad_norm was above alarms.gradient_spike_factor = {factor:g} times its median in {len(spikes)} of "
        f"the last {window} steps, up to {max(spikes):.3g} times"
    )


def _canary(series: Series, limits: Limits) -> str | None:
    settings, metric = limits.settings, "publish/canary_server_max"
    now, shown = series.at_end(metric), series.last(metric, series.num_steps)
    if settings.canary_nats is None or now is None:
        return None
    first = shown[0] if len(shown) > 1 else 0.0
    limit = max(settings.canary_nats, settings.canary_factor * first)
    if now <= limit:
        return None
    allowed = f"alarms.canary_nats = {settings.canary_nats:g}"
    if limit > settings.canary_nats:
        allowed = f"alarms.canary_factor = {settings.canary_factor:g} times that of the first publication, {first:.3g}"
    return f"{metric} {now:.3g} nats is above {allowed}"


def _transport(series: Series, limits: Limits) -> str | None:
    count = series.at_end("publish/fallbacks")
    return "the servers loaded weights from disk because publish.transport had failed" if count else None


def _staleness_at_bound(series: Series, limits: Limits) -> str | None:
    share, bound, window = limits.settings.staleness_share_of_bound, limits.max_staleness, limits.settings.window_steps
    stalest = series.last("staleness/mean", window)
    if share is None or bound is None or len(stalest) < window or min(stalest) < share * bound:
        return None
    waiting = series.last("overlap/trainer_wait_share", window)
    waited = f"; the trainer waited for {100 * fmean(waiting):.0f} % of its time" if waiting else ""
    at_least = f"staleness/mean was at least {min(stalest):.3g} for {window} steps"
    return f"{at_least}; staleness.max_staleness = {bound}{waited}"


def _server_loss(series: Series, limits: Limits) -> str | None:
    lost, members = limits.settings.lost_servers, series.last("fleet/members", series.num_steps)
    if lost is None or not members:
        return None
    missing = max(members) - members[-1]
    if missing >= lost:
        return f"{members[-1]:.0f} servers respond, {missing:.0f} fewer than before"
    restarts = series.last("fleet/restarts", 2)
    if len(restarts) == 2 and restarts[1] - restarts[0] >= lost:  # a restarted collector counts from 0
        return f"{restarts[1] - restarts[0]:.0f} servers returned without the current weights"
    return None


def _failed_evaluation(series: Series, limits: Limits) -> str | None:
    counts = series.last("fleet/failed_evaluations", 2)
    failed = counts[-1] - (counts[-2] if len(counts) == 2 else 0) if counts else 0
    return describe_failed_evaluations(failed) if failed > 0 else None


def describe_failed_evaluations(count: float) -> str:
    if count == 1:
        return "1 evaluation failed since the previous step and has no score"
    return f"{count:.0f} evaluations failed since the previous step and have no scores"


@dataclass(frozen=True)
class _Watched:
    check: Check
    remedy: str


CHECKS: dict[AlarmName, _Watched] = {
    "not_finite": _Watched(
        _not_finite,
        "go back to an earlier checkpoint (write its name into checkpoints/latest) and lower optimizer.learning_rate",
    ),
    "entropy_collapse": _Watched(
        _average_beyond("policy/entropy", "entropy_collapse_nats", "below", " nats"),
        "the policy hardly explores any more: lower optimizer.learning_rate, raise objective.clip_high, or exclude "
        "prompts that it always solves (data.max_pass_rate)",
    ),
    "entropy_explosion": _Watched(
        _entropy_explosion,
        "the policy degenerates: inspect the sampled rollouts and mismatch/kl_k3, then go back to an "
        "earlier checkpoint with a lower optimizer.learning_rate or less staleness",
    ),
    "reward_drop": _Watched(
        _reward_drop,
        "go back to the checkpoint of the best evaluation (checkpoint.keep_best) with a lower optimizer.learning_rate "
        "or less staleness; with data.curriculum = easy_first the prompts may only have become harder",
    ),
    "no_gradient": _Watched(
        _no_gradient,
        "inspect rollouts and rewards (`minpro show`): the grader may give every response the same reward, or "
        "the prompts may all be too easy or too hard (data.min_pass_rate, data.max_pass_rate, batch.dynamic_sampling)",
    ),
    "failed_grades": _Watched(
        _failed_grades,
        "see logs/collect.log for the first failures; correct the grader or the answers, or raise "
        "reward.timeout_s; groups with such a response are excluded from training",
    ),
    "gradient_spikes": _Watched(
        _gradient_spikes,
        "inspect the rollouts of these steps (`minpro show`) and ratio/max; lower optimizer.clip_grad or "
        "optimizer.learning_rate",
    ),
    "effective_sample_size": _Watched(
        _average_beyond("objective/effective_sample_size", "effective_sample_size", "below"),
        "a few tokens dominate the gradient: lower the staleness, raise batch.mini_batch_prompts, or lower "
        "optimizer.learning_rate or objective.clip_high",
    ),
    "mismatch": _Watched(
        _average_beyond("mismatch/kl_k3", "mismatch_kl_nats", "above", " nats"),
        "servers and trainer disagree under the same weights: inspect publish/canary_abs_max, set server.dtype to "
        "model.dtype, set model.routing_replay = rollout for MoE models, or enable loss.truncated_importance or "
        "loss.icepop",
    ),
    "canary": _Watched(
        _canary,
        "a server's results differ from the trainer's although the checksums of the weights agree: the trainer's log "
        "names the server; compare server.dtype with model.dtype and the server's flags, or restart that server",
    ),
    "transport": _Watched(
        _transport,
        "logs/train.log names the servers and what they answered: check that they can reach the trainer's address "
        "(NCCL_SOCKET_IFNAME, firewall), or set publish.transport = disk",
    ),
    "staleness_at_bound": _Watched(
        _staleness_at_bound,
        "if the trainer hardly waits, the servers are faster than the trainer: a lower staleness.max_staleness costs "
        "no time and gives fresher rollouts; if it waits, responses take longer than the bound allows: shorten them or "
        "add servers",
    ),
    "server_loss": _Watched(
        _server_loss,
        "see logs/serve.log and logs/server-*.log; serve restarts the servers that it started, but not external "
        "servers",
    ),
    "failed_evaluation": _Watched(
        _failed_evaluation,
        "logs/collect.log states which and why: raise server.request_timeout_s if requests timed out, and see "
        "logs/server-*.log if servers failed",
    ),
}  # fmt: skip
WATCHED = (
    *MUST_BE_FINITE,
    "reward/mean",
    "reward/min",
    "reward/max",
    "reward/equal_groups",
    "reward/grader_failed",
    "reward/grader_timed_out",
    "objective/effective_sample_size",
    "mismatch/kl_k3",
    "publish/canary_server_max",
    "publish/fallbacks",
    "staleness/mean",
    "overlap/trainer_wait_share",
    "fleet/members",
    "fleet/restarts",
    "fleet/failed_evaluations",
)


class AlarmWatch:
    """Decides which findings of the checks are new alarms; `add` every global step once, in order."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._series = Series(limits.settings.window_steps)
        self._last_found: dict[AlarmName, int] = {}
        self.num_raised: dict[AlarmName, int] = {}

    def add(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that this step raises."""
        self._series.add(metrics)
        return self._raised(step)

    def complete(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms that `metrics` raise, which the step that was added last did not have yet."""
        self._series.complete(metrics)
        return self._raised(step)

    def _raised(self, step: int) -> list[Alarm]:
        raised = []
        for name, watched in CHECKS.items():
            seen = watched.check(self._series, self._limits)
            if seen is None:
                continue
            last, self._last_found[name] = self._last_found.get(name), step
            if last is None or step - last > self._limits.settings.window_steps:
                self.num_raised[name] = self.num_raised.get(name, 0) + 1
                raised.append(Alarm(step, name, seen, watched.remedy))
        return raised
