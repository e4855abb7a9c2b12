"""The updates of one global step, and the checks that end a diverged run."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from minpro_megatron.actor import garbage
from minpro_megatron.actor.learning_rate import learning_rate_at
from minpro_megatron.actor.memory import rank_memory
from minpro_megatron.actor.policy import Policy, UpdateResult
from minpro_megatron.actor.routing import Routes
from minpro_megatron.actor.start_gate import refuse_unequal_start
from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.config.run import RunConfig
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.errors import RunFailed
from minpro_megatron.metrics.histograms import merge_histograms
from minpro_megatron.metrics.metric import Metric, largest, mean, merge, total, values
from minpro_megatron.parallel.mesh import Mesh

MAX_BROKEN_UPDATES = 3  # in a row


@dataclass(frozen=True)
class TrainedBatch:
    """The results of the updates of a global step, merged over all ranks."""

    metrics: dict[str, Metric]
    histograms: dict[str, np.ndarray]
    log_probs: list[np.ndarray]  # of each mini-batch, before its update; empty where they are not recorded
    changed: bool  # whether any update changed the weights


class Updates:
    """Runs the updates. `count` is the number of updates since the start of the run; `skipped` of them did not change
    the optimizer."""

    def __init__(self, config: RunConfig, mesh: Mesh, policy: Policy) -> None:
        self.count = 0
        self.skipped = 0
        self._config = config
        self._mesh = mesh
        self._policy = policy
        self._broken_in_a_row = 0
        self._start_is_checked = False

    def resume(self, count: int, applied: int) -> None:
        """Continue after `count` updates, `applied` of which the optimizer has made."""
        self.count, self.skipped = count, count - applied

    def run_step(
        self,
        step: int,
        mini_batches: list[list[TokenSequence]],
        routes: list[Routes] | None,
        guard: Callable[[str], AbstractContextManager[None]],
    ) -> TrainedBatch:
        """One update for each mini-batch of global step `step`. Collective. `guard` limits the time of each.

        Raises RunFailed if the first mini-batch of the run shows that scoring and training differ, or if the gradient
        was not finite MAX_BROKEN_UPDATES times in a row.
        """
        learning_rate = learning_rate_at(self._config.optimizer, step)
        results: list[UpdateResult] = []
        for index, mini_batch in enumerate(mini_batches):
            seed = derive_seed(self._config.seed, "update", self.count)
            with guard(f"update {self.count} (global step {step})"):
                result = self._policy.update(mini_batch, learning_rate, seed, routes[index] if routes else None)
                garbage.collect()
            self._refuse_an_unequal_start(result, step)
            self.count += 1
            self.skipped += not result.applied
            self.refuse_a_diverged_run(result, step)
            results.append(result)
        return self._merged(results)

    def _merged(self, results: list[UpdateResult]) -> TrainedBatch:
        parts = [result.metrics for result in results]
        if self._mesh.rank == 0:  # these are the same on all ranks, so one rank reports them
            parts += [_optimizer_metrics(result) for result in results]
        parts.append(rank_memory(self._mesh.device))
        by_rank = self._mesh.from_all_ranks((merge(parts), merge_histograms([one.histograms for one in results])))
        return TrainedBatch(
            metrics=merge([metrics for metrics, _ in by_rank]),
            histograms=merge_histograms([histograms for _, histograms in by_rank]),
            log_probs=[result.log_probs for result in results if result.log_probs is not None],
            changed=any(result.applied and result.grad_norm * result.learning_rate > 0 for result in results),
        )

    def _refuse_an_unequal_start(self, result: UpdateResult, step: int) -> None:
        """Checks the first mini-batch of global step 0 that has a token to train on."""
        if not self._config.objective.compares_policies:
            return
        if (
            self._config.staleness.behavior_log_probs == "rollout"
        ):  # those differ by the rounding of the servers' engine
            return
        if self._start_is_checked or result.skipped == "no trained token":
            return
        self._start_is_checked = True
        if step == 0:
            by_rank = self._mesh.from_all_ranks((result.metrics, result.histograms))
            metrics = values(merge([metrics for metrics, _ in by_rank]))
            log_ratios = merge_histograms([histograms for _, histograms in by_rank])["ratio/log"]
            refuse_unequal_start(metrics, log_ratios, self._config.model.dtype)

    def refuse_a_diverged_run(self, result: UpdateResult, step: int) -> None:
        """Raises RunFailed at the third update in a row whose gradient is not finite: the run will not recover."""
        self._broken_in_a_row = self._broken_in_a_row + 1 if result.skipped == "gradient not finite" else 0
        if self._broken_in_a_row < MAX_BROKEN_UPDATES:
            return
        metrics = values(merge(self._mesh.from_all_ranks(result.metrics)))
        names = self._policy.parameters_with_broken_gradient()
        ratio = f", largest ratio {metrics['ratio/max']:.4g}" if "ratio/max" in metrics else ""
        raise RunFailed(
            f"global step {step}, update {self.count}: the gradient was not finite {self._broken_in_a_row} times in "
            f"a row. Loss {metrics['objective/loss']:.4g}{ratio}, entropy {metrics['policy/entropy']:.4g}; "
            f"{len(names)} parameters have such gradients, first {names[:3]}. "
            "If the loss is not finite either, the weights or the log-probs are broken: restart from earlier weights "
            "and lower optimizer.learning_rate; if it is, the backward pass overflowed: inspect those parameters"
        )


def _optimizer_metrics(result: UpdateResult) -> dict[str, Metric]:
    return {
        "optimizer/grad_norm": mean(result.grad_norm, 1),
        "optimizer/grad_norm_max": largest(result.grad_norm),
        "optimizer/learning_rate": largest(result.learning_rate),
        "optimizer/skipped_updates": total(0.0 if result.applied else 1.0),
    }
