"""One run: reinforcement learning with responses that are many updates old. The same key gives the same numbers.

Batch k is sampled with version max(0, k - delay) and consumed at global step k, as in a run of this project in delay
mode. Losses, advantages and staleness are the project's own functions; sampling, model and optimizer are here.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.stability_study import task
from benchmarks.stability_study.gradients import Gradient, MiniBatch, forward_groups, gradient, loss_slopes
from benchmarks.stability_study.policy import Policy
from minpro_megatron.buffer.staleness import batches_of_version, evaluated_versions
from minpro_megatron.config.objective import ObjectiveConfig, ObjectiveSection
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.objective.advantages import group_advantages
from minpro_megatron.objective.registry import objective_for

COMPARED = ("cispo", "minpro")
HELDOUT_SEED = 0  # of the held-out problems and of the noise that samples their responses, for all runs
# What is stored of an update's statistics (minpro_megatron.metrics.declared describes them).
STATISTICS = (
    "objective/clipped_fraction",
    "objective/masked_fraction",
    "objective/weight_mean",
    "objective/weight_square_mean",
    "ratio/log_second_moment",
    "ratio/max",
    "prefix_min/mean",
    "prefix_ratio/gap_abs_mean",
)
BY_POSITION = ("prefix_min/mean_by_position/", "prefix_ratio/gap_abs_by_position/")


@dataclass(frozen=True)
class TrialSettings:
    """What all runs have in common. The optimizer is AdamW with the moments, decay and gradient norm of the paper."""

    num_global_steps: int = 150
    num_prompts: int = 16  # of a global step
    responses_per_prompt: int = 8
    mini_batch_prompts: int = 4  # of an update
    warmup_updates: int = 16
    evaluate_every: int = 5  # global steps
    evaluation_prompts: int = 256  # one response each
    compare_every: int = 10  # global steps; gradients of COMPARED at the same weights and responses
    weight_decay: float = 0.1
    clip_grad: float = 1.0


@dataclass(frozen=True, order=True)
class TrialKey:
    """Seeds decide prompts and noise, the same for every objective, delay and rate."""

    stage: str
    objective: str
    delay: int  # global steps
    seed: int
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.stage} {self.objective} delay {self.delay} seed {self.seed} rate {self.learning_rate:g}"


@dataclass
class TrialResult:
    """Numbers of a run by global step, or by evaluated version."""

    heldout: list[float] = field(default_factory=list)  # accuracy at each evaluated version
    steps: list[dict[str, float]] = field(default_factory=list)  # means over the updates of each global step
    compared: list[dict[str, float]] = field(default_factory=list)
    ended_at: int | None = None  # the global step whose loss or gradient was not finite


@dataclass(frozen=True)
class Rollouts:
    """A batch with its behavior log-probs, in the order of its prompts."""

    sequences: Tensor
    behavior_log_probs_BT: Tensor
    rewards: np.ndarray


def objective_section(name: str) -> ObjectiveSection:
    """The objective with the settings of its own paper, or of arXiv:2601.22718's comparison."""
    return TypeAdapter(ObjectiveConfig).validate_python({"name": name})


class Trial:
    """A run from the weights `initial`."""

    def __init__(self, key: TrialKey, initial: Mapping[str, Tensor], settings: TrialSettings) -> None:
        self._key, self._settings = key, settings
        self._section = objective_section(key.objective)
        self._rate_factor = objective_for(self._section).learning_rate_factor
        self._policy = Policy()
        self._policy.load_state_dict(initial)
        self._optimizer = torch.optim.AdamW(
            self._policy.parameters(), lr=key.learning_rate, weight_decay=settings.weight_decay
        )
        self._updates = 0
        self._heldout = task.make_prompts(derive_seed(HELDOUT_SEED, "held-out"), settings.evaluation_prompts)

    def run(self) -> TrialResult:
        settings, result, waiting = self._settings, TrialResult(), dict[int, Rollouts]()
        evaluated = evaluated_versions(settings.num_global_steps, settings.evaluate_every)
        for version in range(settings.num_global_steps + 1):
            if version in evaluated:
                result.heldout.append(self._evaluate())
            if version == settings.num_global_steps:
                break
            for index in batches_of_version(version, self._key.delay, settings.num_global_steps):
                waiting[index] = self._sample(index)
            try:
                self._global_step(version, waiting.pop(version), result)
            except FloatingPointError:
                result.ended_at = version
                break
        return result

    def _random(self, purpose: str, *indices: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self._key.seed, purpose, *indices))

    def _evaluate(self) -> float:
        random = torch.Generator().manual_seed(derive_seed(HELDOUT_SEED, "held-out noise"))
        sequences = self._policy.sample(torch.from_numpy(self._heldout), 1, random)
        return float(task.rewards(self._heldout, sequences[:, task.PROMPT_TOKENS :].numpy()).mean())

    @torch.no_grad()
    def _sample(self, index: int) -> Rollouts:
        settings = self._settings
        prompts = task.make_prompts(derive_seed(self._key.seed, "prompts", index), settings.num_prompts)
        sequences = self._policy.sample(
            torch.from_numpy(prompts), settings.responses_per_prompt, self._random("sampling", index)
        )
        repeated = np.repeat(prompts, settings.responses_per_prompt, axis=0)
        rewards = task.rewards(repeated, sequences[:, task.PROMPT_TOKENS :].numpy())
        return Rollouts(sequences, self._policy.log_probs(sequences)[0], rewards)

    def _global_step(self, step: int, rollouts: Rollouts, result: TrialResult) -> None:
        settings = self._settings
        if step % settings.compare_every == 0:
            result.compared.append(self._compared(rollouts))
        by_update = defaultdict[str, list[float]](list)
        size = settings.mini_batch_prompts
        for first in range(0, settings.num_prompts, size):
            seed = derive_seed(self._key.seed, "objective", step, first)
            for name, value in self._update(self._groups(rollouts, first, size, seed)).items():
                by_update[name].append(value)
        means = {name: fmean(values) for name, values in by_update.items()}
        result.steps.append(means | {"reward": float(rollouts.rewards.mean())})

    def _groups(self, rollouts: Rollouts, first: int, count: int, seed: int) -> MiniBatch:
        """The prompt groups first .. first + count - 1."""
        size = self._settings.responses_per_prompt
        part = slice(first * size, (first + count) * size)
        advantages = [group_advantages(list(group)) for group in rollouts.rewards[part].reshape(-1, size)]
        return MiniBatch(
            rollouts.sequences[part],
            rollouts.behavior_log_probs_BT[part],
            torch.from_numpy(np.concatenate(advantages)),
            count,
            seed,
        )

    def _compared(self, rollouts: Rollouts) -> dict[str, float]:
        """The gradients of COMPARED for all prompt groups of a global step, before its updates."""
        batch = self._groups(rollouts, 0, self._settings.num_prompts, seed=0)
        log_probs, _ = forward_groups(self._policy.log_probs, batch)
        compared = {}
        for name in COMPARED:
            slopes = loss_slopes(objective_section(name), log_probs, batch)
            found = gradient(self._policy, log_probs, slopes, keep_graph=True)
            compared |= {f"{name}/squared_norm": found.squared_norm, f"{name}/variance": found.variance}
        return compared

    def _update(self, batch: MiniBatch) -> dict[str, float]:
        """Statistics of the update. Raises FloatingPointError if its gradient is not finite."""
        log_probs, entropies = forward_groups(self._policy.log_probs, batch)
        metrics: dict[str, float] = {}
        slopes = loss_slopes(self._section, log_probs, batch, metrics)
        found = gradient(self._policy, log_probs, slopes, keep_graph=False)
        if not math.isfinite(found.squared_norm):
            raise FloatingPointError(f"{self._key.name}: the gradient of update {self._updates} is not finite")
        self._apply(found, metrics[self._rate_factor] if self._rate_factor else 1.0)
        kept = {name: value for name, value in metrics.items() if name in STATISTICS or name.startswith(BY_POSITION)}
        return kept | {
            "entropy": float(entropies.mean()),
            "squared_norm": found.squared_norm,
            "variance": found.variance,
        }

    def _apply(self, found: Gradient, rate_factor: float) -> None:
        self._updates += 1
        warmup = min(1.0, self._updates / self._settings.warmup_updates)
        for group in self._optimizer.param_groups:
            group["lr"] = self._key.learning_rate * warmup * rate_factor
        clip = min(1.0, self._settings.clip_grad / (math.sqrt(found.squared_norm) + 1e-6))
        start = 0
        for parameter in self._policy.parameters():
            part = found.vector[start : start + parameter.numel()]
            parameter.grad = (part * clip).view_as(parameter)
            start += parameter.numel()
        self._optimizer.step()
