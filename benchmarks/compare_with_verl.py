"""Compares the objectives with verl's registered policy losses on the same random ragged batches: loss and gradient.

    python -m benchmarks.compare_with_verl [--batches 50]

This check is not part of the tests, because it needs verl (benchmarks/README.md says how to get it). It prints a
Markdown table of the largest relative differences over all batches, and ends with status 1 if one exceeds the limit
stated in the table. A gradient's difference is relative to its largest element, a loss's to |loss| plus the sum of
|gradient|, because a loss may cancel to almost nothing. The batches have sequences of different lengths, masked holes
inside the responses, and one completely masked sequence. `drift` is the standard deviation of log pi - log pi_old;
GSPO's narrow clip also gets a small one, as with a large one every sequence is clipped or far outside the clip. `far`
batches have differences of up to 60 nats.
"""

import argparse
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig

from minpro_megatron.config.objective import (
    CispoConfig,
    DppoConfig,
    GrpoConfig,
    GspoConfig,
    ObjectiveSection,
    SapoConfig,
)
from minpro_megatron.objective.across_ranks.scan import WholeSequenceScan
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import policy_tokens, summed_loss

SEQUENCES, LONGEST = 16, 200
VERL_AGGREGATION = {"token_mean": "token-mean", "sequence_mean": "seq-mean-token-mean"}


@dataclass(frozen=True)
class Batch:
    """Padded on the right to [SEQUENCES, LONGEST], as verl takes it; the mask is 0 in the padding."""

    log_probs: Tensor
    behavior: Tensor
    advantages: Tensor
    mask: Tensor
    inside: Tensor  # bool: not padding

    def to(self, dtype: torch.dtype) -> "Batch":
        return Batch(
            self.log_probs.to(dtype),
            self.behavior.to(dtype),
            self.advantages.to(dtype),
            self.mask.to(dtype),
            self.inside,
        )


def random_batch(seed: int, drift: float, far: bool, shortest: int, probabilities: bool) -> Batch:
    """All numbers are float32 numbers, so that both precisions start from the same values. With `probabilities` no
    log-prob exceeds 0; otherwise the behavior's may, of which only the difference to the policy's is read."""
    random = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, LONGEST)
    lengths = torch.randint(shortest, LONGEST + 1, (SEQUENCES, 1), generator=random)
    inside = torch.arange(LONGEST) < lengths
    mask = inside & (torch.rand(shape, generator=random) > 0.2)
    mask[SEQUENCES // 2] = False
    log_probs = torch.rand(shape, generator=random).log()
    difference = torch.empty(shape).normal_(0, drift, generator=random)
    if far:
        chosen = torch.rand(shape, generator=random) < 0.1
        difference = torch.where(chosen, 120 * torch.rand(shape, generator=random) - 60, difference)
    advantages = torch.empty(SEQUENCES, 1).normal_(0, 1, generator=random).expand(shape)
    behavior = log_probs - difference
    return Batch(log_probs, behavior.clamp(max=0) if probabilities else behavior, advantages, mask.float(), inside)


@dataclass(frozen=True)
class Case:
    objective: str
    verl: str
    settings: ObjectiveSection
    verl_settings: dict[str, float]
    drift: float
    far: bool = False
    shortest: int = 1  # sequence
    probabilities: bool = False  # all log-probs are at most 0
    clamped: bool = False  # verl gets log-ratios that are already clamped to +-20
    deviation: str = ""  # what verl intentionally does differently
    float32: float = 2e-6  # maximum relative difference; verl computes ratios and sums in float32, we do not
    float64: float = 1e-12


REGION = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 20.0}
KL_REGION = {"clip_ratio_low": 0.05, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0}
TEMPERATURES = {"tau_pos": 1.0, "tau_neg": 1.05}
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 10.0}
WIDE = {"clip_ratio_low": 1.0, "clip_ratio_high": 4.0}
NARROW = {"clip_ratio_low": 2e-3, "clip_ratio_high": 2e-3}
NO_GRADIENT = "no gradient where a log-ratio is clamped at -20 (ours: exp(-20) of it)"
ADDS = "1e-8 is added to a sequence's token count"
CLAMPS_MEAN = "no clamp of tokens' log-ratios: done for it; the mean is clamped at 10, which none here reaches"


def cases() -> list[Case]:
    found = []
    for aggregation in ("token_mean", "sequence_mean"):
        grpo, gspo, cispo = (kind(aggregation=aggregation) for kind in (GrpoConfig, GspoConfig, CispoConfig))
        by_sequence = aggregation == "sequence_mean"
        adds = ADDS if by_sequence else ""
        float64 = 2e-8 if by_sequence else 1e-12
        found += [
            Case("grpo", "vanilla", grpo, CLIP, 1.2, deviation=adds, float64=float64),
            Case("grpo", "vanilla", grpo, CLIP, 1.2, far=True, deviation=adds or NO_GRADIENT, float64=2e-8),
            Case("cispo", "cispo", cispo, WIDE, 1.2, deviation=adds, float64=float64),
            Case("cispo", "cispo", cispo, WIDE, 1.2, far=True, deviation=adds, float64=float64),
            Case("gspo", "gspo", gspo, NARROW, 0.02, deviation=adds, float64=float64),
            Case("gspo", "gspo", gspo, NARROW, 1.2, deviation=adds, float64=float64),
        ]
        dppo = DppoConfig(aggregation=aggregation)
        kl = DppoConfig(aggregation=aggregation, divergence="kl", threshold_low=0.05, threshold_high=0.05)
        for verl, settings, region, far in (
            ("dppo_tv", dppo, REGION, False),
            ("dppo_tv", dppo, REGION, True),
            ("dppo_kl", kl, KL_REGION, False),
        ):
            found.append(
                Case("dppo", verl, settings, region, 1.2, far, probabilities=True, deviation=adds, float64=float64)
            )
    sapo = SapoConfig()
    found += [
        Case("sapo", "sapo", sapo, TEMPERATURES, 1.2, deviation=ADDS, float32=1e-5, float64=2e-8),
        Case("sapo", "sapo", sapo, TEMPERATURES, 1.2, far=True, deviation=ADDS, float32=1e-5, float64=2e-8),
    ]
    gspo = GspoConfig(aggregation="token_mean")
    found.append(Case("gspo", "gspo", gspo, NARROW, 1.2, far=True, shortest=20, clamped=True, deviation=CLAMPS_MEAN))
    return found


def ours(batch: Batch, case: Case) -> tuple[float, Tensor]:
    """(loss, gradient of the log-probs [SEQUENCES, LONGEST])."""
    inside = batch.inside
    sequence = torch.arange(SEQUENCES)[:, None].expand_as(inside)[inside]
    log_probs, mask = batch.log_probs[inside].requires_grad_(), batch.mask[inside]
    scan = WholeSequenceScan(sequence, mask)
    ids = torch.arange(len(mask))
    tokens = policy_tokens(log_probs, batch.behavior[inside], batch.advantages[inside], mask, scan, ids)
    terms = OBJECTIVES[case.objective].terms(tokens, case.settings)
    lengths = scan.whole(mask, "sum")
    by_sequence = case.settings.aggregation == "sequence_mean"
    weight = torch.where(mask > 0, mask / lengths, 0.0) if by_sequence else mask
    count = (batch.mask.sum(1) > 0).sum() if by_sequence else mask.sum()
    loss = summed_loss(log_probs, terms, weight) / count
    gradient = torch.zeros_like(batch.log_probs)
    gradient[inside] = torch.autograd.grad(loss, log_probs)[0]
    return loss.item(), gradient


def verls(batch: Batch, case: Case) -> tuple[float, Tensor, dict[str, float]]:
    """(loss, gradient, metrics)."""
    log_probs = batch.log_probs.clone().requires_grad_()
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **case.verl_settings)
    mode = VERL_AGGREGATION[case.settings.aggregation]
    policy_loss = get_policy_loss_fn(case.verl)
    behavior = batch.behavior
    if case.clamped:
        behavior = batch.log_probs - (batch.log_probs - behavior).clamp(-20, 20)
    loss, metrics = policy_loss(behavior, log_probs, batch.advantages, batch.mask, mode, config)
    return loss.item(), torch.autograd.grad(loss, log_probs)[0], metrics


def largest_differences(case: Case, dtype: torch.dtype, num_batches: int) -> tuple[float, float, float, float]:
    """(loss, gradient), relative; verl's shares of clipped and of dual-clipped tokens, mean over the batches."""
    loss_difference = gradient_difference = clipped = dual_clipped = 0.0
    for seed in range(num_batches):
        batch = random_batch(seed, case.drift, case.far, case.shortest, case.probabilities).to(dtype)
        loss, gradient = ours(batch, case)
        verl_loss, verl_gradient, metrics = verls(batch, case)
        size = abs(verl_loss) + verl_gradient.abs().sum().item()
        loss_difference = max(loss_difference, abs(loss - verl_loss) / size)
        gradient_difference = max(
            gradient_difference, ((gradient - verl_gradient).abs().max() / verl_gradient.abs().max()).item()
        )
        clipped += metrics["actor/pg_clipfrac"] / num_batches
        dual_clipped += metrics["actor/pg_clipfrac_lower"] / num_batches
    return loss_difference, gradient_difference, clipped, dual_clipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=50)
    num_batches = parser.parse_args().batches
    print(
        "| objective | verl's | mean over | drift | dtype | loss | gradient | allowed | clipped | dual | verl differs |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    failures = 0
    for case in cases():
        for dtype, allowed in ((torch.float32, case.float32), (torch.float64, case.float64)):
            loss, gradient, clipped, dual = largest_differences(case, dtype, num_batches)
            agrees = max(loss, gradient) <= allowed
            failures += not agrees
            print(
                f"| {case.objective} | {case.verl} | {case.settings.aggregation.split('_')[0]} "
                f"| {case.drift}{', far' if case.far else ''} | {str(dtype).removeprefix('torch.')} "
                f"| {loss:.1e} | {gradient:.1e} | {allowed:.0e}{'' if agrees else ' EXCEEDED'} "
                f"| {clipped:.0%} | {dual:.1%} | {case.deviation} |"
            )
    if failures:
        sys.exit(f"{failures} rows differ by more than is allowed")


if __name__ == "__main__":
    main()
