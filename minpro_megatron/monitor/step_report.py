"""What the trainer writes after a global step: metrics, histograms, samples and alarms."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minpro_megatron.config.reward import is_right
from minpro_megatron.metrics.histograms import bin_edges, histogram_quantile
from minpro_megatron.metrics.metric import Metric, largest, mean, merge, smallest, total
from minpro_megatron.monitor.alarm_log import AlarmLog
from minpro_megatron.monitor.alarms import Alarm
from minpro_megatron.monitor.memory import stated_host_bytes
from minpro_megatron.monitor.samples import MAX_TOKENS, write_samples
from minpro_megatron.monitor.step_line import evaluation_line, step_line
from minpro_megatron.monitor.throughput import TrainerCompute
from minpro_megatron.monitor.writer import RunWriter
from minpro_megatron.records import Batch, CollectedGroup, CollectorTotals, EvaluationResult, Response

log = logging.getLogger(__name__)

SAMPLES_EVERY_STEPS = 10
HISTOGRAMS_EVERY_STEPS = 10
MAX_SAMPLE_CHARACTERS = 2000
MAX_LOG_RATIO = 20.0  # the same as in the objectives
# By histogram: the name of its quantiles, and the function that maps a quantile to the metric's value.
QUANTILES: dict[str, tuple[str, Callable[[float], float]]] = {
    "ratio/log": ("ratio/quantile", math.exp),
    "prefix_min/log": ("prefix_min/quantile", math.exp),
    "prefix_ratio/gap": ("prefix_ratio/gap_quantile", float),
}


def batch_metrics(batch: Batch, step: int, right_reward: float) -> dict[str, Metric]:
    """The metrics of the groups that global step `step` consumes. `right_reward`: the run's
    reward.right_reward."""
    kinds = {kind: [group for group in batch.groups if _kind(group) == kind] for kind in ("prefixed", "plain")}
    responses = [response for group in batch.groups for response in group.responses]
    rewards, lengths = [response.reward for response in responses], [len(response.token_ids) for response in responses]
    stale = [step - group.oldest_version for group in batch.groups]
    truncated = sum(response.finish_reason == "length" for response in responses)
    prompts = sum(len(group.responses) * len(group.issued.prompt_token_ids) for group in batch.groups)
    found = {"response/length_max": largest(max(lengths)), "batch/tokens": total(sum(lengths) + prompts)}
    if not any(response.is_graded for response in responses):  # demonstrations: nobody sampled or graded them
        return found | {"response/length_mean": mean(sum(lengths), len(lengths))}
    found |= {
        "reward/mean": mean(math.fsum(rewards), len(responses)),
        "reward/min": smallest(min(rewards)),
        "reward/max": largest(max(rewards)),
        "staleness/min": smallest(min(stale)),
        "staleness/mean": mean(sum(stale), len(stale)),
        "staleness/max": largest(max(stale)),
        "response/truncated_fraction": mean(truncated, len(responses)),
    }
    of_kinds = {kind: _of_kind(groups, right_reward) for kind, groups in kinds.items() if groups}
    for kind, metrics in of_kinds.items():
        found |= {f"{name}_by_prompt/{kind}": metric for name, metric in metrics.items()}
    found |= _of_episodes(responses)
    merged = merge(list(of_kinds.values()))
    merged["response/length_mean"] = merged.pop("response/length")
    return found | merged


def _of_episodes(responses: Sequence[Response]) -> dict[str, Metric]:
    """The metrics of an environment; none without one."""
    turns = [turn for response in responses for turn in response.turns]
    if not turns:
        return {}
    asked = [turn for turn in turns if turn.seconds > 0]
    num_tokens = sum(len(response.token_ids) for response in responses)
    found = {
        "episode/turns": mean(len(turns), len(responses)),
        "episode/given_fraction": mean(num_tokens - sum(one.num_sampled for one in responses), num_tokens),
        "episode/tool_calls": mean(sum(turn.tool_calls for turn in turns), len(responses)),
    }
    if not asked:
        return found
    seconds = [turn.seconds for turn in asked]
    return found | {
        "episode/failed_turns": mean(sum(bool(turn.problem) for turn in asked), len(asked)),
        "episode/answer_s": mean(math.fsum(seconds), len(asked)),
        "episode/answer_s_max": largest(max(seconds)),
    }


def _kind(group: CollectedGroup) -> str:
    return "prefixed" if group.issued.prompt.prefix else "plain"


def _of_kind(groups: Sequence[CollectedGroup], right_reward: float) -> dict[str, Metric]:
    """The metrics that are also reported by kind of prompt."""
    responses = [response for group in groups for response in group.responses]
    equal = sum(len({response.reward for response in group.responses}) == 1 for group in groups)
    return {
        "reward/accuracy": mean(sum(is_right(r.reward, right_reward) for r in responses), len(responses)),
        "reward/equal_groups": mean(equal, len(groups)),
        "response/length": mean(sum(len(response.token_ids) for response in responses), len(responses)),
    }


def token_staleness(batch: Batch, step: int) -> np.ndarray:
    """The staleness of every sampled token of the batch as global step `step` consumes it, int32."""
    return np.concatenate([step - r.of_sampled(r.policy_versions) for group in batch.groups for r in group.responses])


def derived_metrics(scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The derived metrics of METRICS: effective sample sizes and quantiles over the tokens of a step."""
    derived = {}
    for name, square in scalars.items():
        area, _, rest = name.partition("/")
        row, found, suffix = rest.partition("square_")  # mean, or by_position/<first> and the like
        if found and square > 0:
            of, kind = "" if suffix == "mean" else f"_{suffix}", row if row == "sequence_" else ""
            derived[f"{area}/{kind}effective_sample_size{of}"] = scalars[name.replace(found, "", 1)] ** 2 / square
    for name, counts in histograms.items():
        if counts.any():
            called, of_log = QUANTILES[name]
            for percent in (1, 50, 99):
                derived[f"{called}_{percent:02d}"] = of_log(histogram_quantile(counts, percent / 100))
    return derived


def _evaluation_scalars(result: EvaluationResult) -> dict[str, float]:
    if result.benchmark:
        return {
            f"evaluation/accuracy/{result.benchmark}": result.pass_at_1,
            f"evaluation/standard_error/{result.benchmark}": result.standard_error,
            f"evaluation/mean_reward/{result.benchmark}": result.mean_reward,
            f"evaluation/not_graded/{result.benchmark}": float(result.not_graded),
            f"evaluation/response_length_mean/{result.benchmark}": result.mean_response_tokens,
        }
    return {
        "eval/pass_at_1": result.pass_at_1,
        "eval/standard_error": result.standard_error,
        "eval/mean_reward": result.mean_reward,
        "eval/not_graded": float(result.not_graded),
        "eval/response_length_mean": result.mean_response_tokens,
    }


class StepReport:
    """Writes a run's steps and evaluations; rank 0 of the trainer holds one."""

    def __init__(
        self,
        writer: RunWriter,
        response_text: Callable[[np.ndarray], str],
        first_step: int = 0,
        compute: TrainerCompute | None = None,
        alarms: AlarmLog | None = None,
    ) -> None:
        """`response_text` turns a response's token ids into text, for the samples. Evaluations of versions before
        `first_step` were written by an earlier incarnation of the run. A timer that replaces the trainer has neither
        `compute` nor `alarms`."""
        self._writer = writer
        self._response_text = response_text
        self._first_step = first_step
        self._compute = compute
        self._alarms = alarms
        self._evaluated: set[tuple[int, str]] = set()
        self._last_step = first_step
        self._failed_evaluations = 0  # number that the metrics of the steps have counted
        self._log_ratios: np.ndarray | None = None  # of the batch's response tokens, if they are recorded

    def trained(self, behavior_log_probs: np.ndarray, log_probs: Sequence[np.ndarray]) -> None:
        """Sets the log-probs of the batch of the next step, for the samples: those of its response tokens in canonical
        order. `log_probs` are those at the update, by mini-batch (empty: they are not recorded)."""
        self._log_ratios = np.concatenate(log_probs) - behavior_log_probs if log_probs else None

    def step(
        self, step: int, scalars: dict[str, float], histograms: Mapping[str, np.ndarray], batch: Batch
    ) -> list[Alarm]:
        """Writes the metrics of a global step. Returns the alarms that it raises."""
        if step % SAMPLES_EVERY_STEPS == 0:
            self._show_samples(step, batch)
        if step % HISTOGRAMS_EVERY_STEPS == 0:
            self._show_histograms(step, histograms, batch)
        memory = stated_host_bytes(self._writer.run_dir)
        scalars = scalars | self._rates(scalars, batch) | derived_metrics(scalars, histograms) | memory
        raised: list[Alarm] = []
        if self._alarms is not None:
            raised = self._alarms.step(step, scalars)
            scalars |= self._alarms.counts()
        self._show_alarms(step, raised)
        self._writer.scalars(step, scalars)
        log.info("%s", step_line(step, scalars))
        self._last_step, self._failed_evaluations = step, int(scalars.get("fleet/failed_evaluations", 0))
        return raised

    def published(self, step: int, scalars: dict[str, float]) -> list[Alarm]:
        """Adds the metrics of a publication to the last global step, whose metrics were written before it. Returns the
        alarms that they raise."""
        if not scalars:
            return []
        raised = self._alarms.published(step, scalars) if self._alarms is not None else []
        if self._alarms is not None and raised:
            scalars = scalars | self._alarms.counts()
        self._show_alarms(step, raised)
        self._writer.scalars(step, scalars)
        return raised

    def finished(self, totals: CollectorTotals) -> None:
        """Writes the evaluations after the last global step, and an alarm if some of them failed."""
        self.evaluations(totals.evaluations)
        failed = totals.failed_evaluations - self._failed_evaluations
        if failed > 0 and self._alarms is not None:
            self._alarms.failed_at_end(self._last_step, failed)

    def _show_alarms(self, step: int, raised: Sequence[Alarm]) -> None:
        if raised:
            text = "\n".join(f"- **{alarm.name}**: {alarm.seen}. Try: {alarm.remedy}" for alarm in raised)
            self._writer.text(step, "alarms", text)

    def _rates(self, scalars: Mapping[str, float], batch: Batch) -> dict[str, float]:
        response_tokens = sum(response.num_sampled for group in batch.groups for response in group.responses)
        rates = {
            "throughput/response_tokens_per_s": response_tokens / scalars["time/step_s"],
            "overlap/trainer_wait_share": scalars["time/wait_for_batch_s"] / scalars["time/step_s"],
        }
        if self._compute is not None:
            rates["throughput/trained_tokens_per_s"] = scalars["batch/tokens"] / scalars["time/train_s"]
            rates |= self._compute.rates(batch, scalars["time/train_s"])
        return rates

    def _show_histograms(self, step: int, histograms: Mapping[str, np.ndarray], batch: Batch) -> None:
        lengths = [len(response.token_ids) for group in batch.groups for response in group.responses]
        self._writer.histogram(step, "response/length", np.asarray(lengths))
        self._writer.histogram(step, "staleness/token", token_staleness(batch, step))
        for name, counts in histograms.items():
            self._writer.counts(step, name, counts, bin_edges())

    def evaluations(self, results: Sequence[EvaluationResult]) -> None:
        """Writes the results that have not been written before."""
        for result in results:
            key = result.policy_version, result.benchmark
            if result.policy_version >= self._first_step and key not in self._evaluated:
                self._evaluated.add(key)
                self._writer.scalars(result.policy_version, _evaluation_scalars(result))
                log.info(
                    "%s",
                    evaluation_line(result.policy_version, result.benchmark, result.pass_at_1, result.standard_error),
                )

    def _show_samples(self, step: int, batch: Batch) -> None:
        first_tokens = np.cumsum([0, *(sum(len(r.token_ids) for r in group.responses) for group in batch.groups)])
        samples = [
            {
                "step": step,
                "prompt": group.issued.prompt.text + group.issued.prompt.prefix,
                "response": self._response_text(group.responses[0].token_ids),
                "answer": group.issued.prompt.answer,
                "reward": group.responses[0].reward if group.responses[0].is_graded else None,
            }
            | _shown_turns(group.responses[0])
            | self._tokens(group.responses[0], first_token)
            for group, first_token in zip(batch.groups[:8], first_tokens, strict=False)
        ]
        self._writer.text(step, "samples", "\n\n".join(_as_markdown(sample) for sample in samples))
        write_samples(self._writer.run_dir, samples)

    def _tokens(self, response: Response, first_token: int) -> dict[str, Any]:
        """The response's tokens with their ratios, for the report; `first_token` is its position in the batch."""
        if self._log_ratios is None:
            return {}
        shown = response.token_ids[:MAX_TOKENS]
        log_ratios = self._log_ratios[first_token : first_token + len(response.token_ids)]
        ratios = np.exp(np.clip(response.without_given(log_ratios), -MAX_LOG_RATIO, MAX_LOG_RATIO))[: len(shown)]
        found = {
            "num_tokens": len(response.token_ids),
            "tokens": [self._response_text(shown[place : place + 1]) for place in range(len(shown))],
            "ratios": [None if math.isnan(ratio) else ratio for ratio in ratios.tolist()],
        }
        if response.loss_mask is None:
            return found
        return found | {"given": (response.loss_mask[: len(shown)] == 0).tolist()}


def _shown_turns(response: Response) -> dict[str, str]:
    """The turns of an episode, each with what was sampled and given, for the report."""
    if not response.turns:
        return {}
    turns = []
    for turn in response.turns:
        facts = f"{turn.sampled_tokens} sampled"
        if turn.given_tokens or turn.seconds:
            facts += f", {turn.given_tokens} given after {turn.seconds:.1f} s"
        turns.append(facts + (f" ({turn.problem})" if turn.problem else ""))
    return {"turns": "; ".join(turns)}


def _as_markdown(sample: Mapping[str, Any]) -> str:
    """A heading, and the text as indented code, because text from outside may contain any markup."""
    text = f"{sample['prompt']}{sample['response']}"
    if len(text) > MAX_SAMPLE_CHARACTERS:
        text = f"{text[:MAX_SAMPLE_CHARACTERS]} ... ({len(text)} characters)"
    shown = [*text.splitlines(), f"(answer: {' '.join(sample['answer'].split())})"]
    heading = "demonstration" if sample["reward"] is None else f"reward {sample['reward']:g}"
    return f"**{heading}**\n\n" + "\n".join(f"    {line}" for line in shown)
