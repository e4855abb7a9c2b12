"""Compares the corrections of the engines' mismatch with verl's rollout correction, in float64, on the same batches.

    python -m benchmarks.compare_with_verl_corrections [--batches 50]

The batches, and the environment that it needs, are those of benchmarks.compare_with_verl; the servers' log-probs differ
from the trainer's by a random number with a standard deviation of 0.3 nats. GRPO's loss is computed with each
correction by both. verl removes the tokens that it rejects from the denominator of the loss, while here they stay in
it: verl's loss is multiplied by the share of tokens that are left. The program prints a Markdown table and ends with
status 1 if a token is masked by only one of both, or a number differs by more than is allowed.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_rejection_mask
from verl.workers.config import ActorConfig

from benchmarks.compare_with_verl import CLIP, Batch, random_batch
from minpro_megatron.config.loss import LossConfig
from minpro_megatron.config.objective import GrpoConfig
from minpro_megatron.objective.across_ranks.scan import WholeSequenceScan
from minpro_megatron.objective.corrections import OtherLogProbs, corrected
from minpro_megatron.objective.registry import OBJECTIVES
from minpro_megatron.objective.terms import policy_tokens, summed_loss

MISMATCH, DRIFT, ALLOWED = 0.3, 0.2, 1e-12


@dataclass(frozen=True)
class Case:
    settings: dict[str, Any]  # of LossConfig
    verl: dict[str, Any]  # arguments of compute_rollout_correction_and_rejection_mask


def _rejection(statistic: str, estimator: str, low: float | None, high: float) -> Case:
    """Bounds in nats, as here; verl takes those of k1 as bounds of the ratio."""
    bounds = f"{_exp(low)}_{_exp(high)}" if estimator == "k1" and low is not None else str(high)
    name = f"token_{estimator}" if statistic == "token" else f"seq_{statistic}_{estimator}"
    section = {"enabled": True, "statistic": statistic, "estimator": estimator, "low": low, "high": high}
    return Case({"rejection": section}, {"rollout_rs": name, "rollout_rs_threshold": bounds})


def _exp(nats: float) -> float:
    return float(torch.tensor(nats, dtype=torch.float64).exp())


CASES = {
    "truncated_importance": Case(
        {"truncated_importance": {"enabled": True, "cap": 1.2}}, {"rollout_is": "token", "rollout_is_threshold": 1.2}
    ),
    "icepop": Case(
        {"icepop": {"enabled": True, "low": 0.7, "high": 1.3}},
        {"rollout_is": "token", "rollout_is_threshold": "0.7_1.3"},
    ),
    "sequence_importance": Case(
        {"sequence_importance": {"enabled": True, "cap": 2.0}},
        {"rollout_is": "sequence", "rollout_is_threshold": 2.0},
    ),
    "rejection: token of k1": _rejection("token", "k1", -0.3, 0.4),
    "rejection: token of k2": _rejection("token", "k2", None, 0.05),
    "rejection: token of k3": _rejection("token", "k3", None, 0.05),
    "rejection: sum of k1": _rejection("sum", "k1", -1.5, 2.0),
    "rejection: sum of k2": _rejection("sum", "k2", None, 4.0),
    "rejection: sum of k3": _rejection("sum", "k3", None, 4.0),
    "rejection: mean of k1": _rejection("mean", "k1", -0.02, 0.02),
    "rejection: mean of k2": _rejection("mean", "k2", None, 0.045),
    "rejection: mean of k3": _rejection("mean", "k3", None, 0.045),
    "rejection: max of k2": _rejection("max", "k2", None, 0.3),
    "rejection: max of k3": _rejection("max", "k3", None, 0.3),
    "sequence_importance, rejection: mean of k3": Case(
        {"sequence_importance": {"enabled": True}}
        | {"rejection": {"enabled": True, "statistic": "mean", "estimator": "k3", "high": 0.045}},
        {"rollout_is": "sequence", "rollout_is_threshold": 5.0}
        | {"rollout_rs": "seq_mean_k3", "rollout_rs_threshold": "0.045"},
    ),
}


def ours(batch: Batch, rollout: Tensor, case: Case) -> tuple[float, Tensor, Tensor]:
    """(loss, gradient [SEQUENCES, LONGEST], bool of the same shape: the token is masked)."""
    inside = batch.inside
    sequence = torch.arange(len(inside))[:, None].expand_as(inside)[inside]
    log_probs, mask, behavior = batch.log_probs[inside].requires_grad_(), batch.mask[inside], batch.behavior[inside]
    scan, ids = WholeSequenceScan(sequence, mask), torch.arange(len(mask))
    tokens = policy_tokens(log_probs, behavior, batch.advantages[inside], mask, scan, ids)
    plain = OBJECTIVES["grpo"].terms(tokens, GrpoConfig())
    nothing = torch.zeros_like(behavior)
    others = OtherLogProbs(behavior, rollout[inside], proximal_L=nothing, reference_L=nothing)
    terms, _ = corrected(plain, tokens, others, LossConfig.model_validate(case.settings))
    loss = summed_loss(log_probs, terms, mask) / mask.sum()
    gradient, masked = torch.zeros_like(batch.log_probs), torch.zeros_like(inside)
    gradient[inside] = torch.autograd.grad(loss, log_probs)[0]
    masked[inside] = terms.excluded_L & (mask > 0)
    return loss.item(), gradient, masked


def verls(batch: Batch, rollout: Tensor, case: Case) -> tuple[float, Tensor, Tensor]:
    weights, mask, _ = compute_rollout_correction_and_rejection_mask(batch.behavior, rollout, batch.mask, **case.verl)
    factors = None if weights is None else weights.batch["rollout_is_weights"]
    log_probs = batch.log_probs.clone().requires_grad_()
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **CLIP)
    policy_loss = get_policy_loss_fn("vanilla")
    loss, _ = policy_loss(batch.behavior, log_probs, batch.advantages, mask, "token-mean", config, factors)
    loss = loss * (mask.sum() / batch.mask.sum())
    masked = (batch.mask > 0) & (mask == 0)
    if factors is not None and "icepop" in case.settings:
        masked |= (batch.mask > 0) & (factors == 0)
    return loss.item(), torch.autograd.grad(loss, log_probs)[0], masked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=50)
    num_batches = parser.parse_args().batches
    print("| correction | verl's | masked | tokens masked by one of both | loss | gradient | allowed |")
    print("|---|---|---|---|---|---|---|")
    failures = 0
    for name, case in CASES.items():
        share = loss_difference = gradient_difference = 0.0
        disagreements = 0
        for seed in range(num_batches):
            batch = random_batch(seed, DRIFT, far=False, shortest=1, probabilities=True).to(torch.float64)
            random = torch.Generator().manual_seed(1000 + seed)
            noise = torch.empty_like(batch.behavior).normal_(0, MISMATCH, generator=random)
            loss, gradient, masked = ours(batch, batch.behavior + noise, case)
            verl_loss, verl_gradient, verl_masked = verls(batch, batch.behavior + noise, case)
            size = abs(verl_loss) + verl_gradient.abs().sum().item()
            loss_difference = max(loss_difference, abs(loss - verl_loss) / size)
            largest = verl_gradient.abs().max()
            gradient_difference = max(gradient_difference, ((gradient - verl_gradient).abs().max() / largest).item())
            disagreements += int((masked != verl_masked).sum())
            share += (masked.sum() / batch.mask.sum()).item() / num_batches
        agrees = max(loss_difference, gradient_difference) <= ALLOWED and not disagreements
        failures += not agrees
        options = ", ".join(str(value) for value in case.verl.values())
        print(
            f"| {name} | {options} | {share:.0%} | {disagreements} | {loss_difference:.1e} "
            f"| {gradient_difference:.1e} | {ALLOWED:.0e}{'' if agrees else ' EXCEEDED'} |"
        )
    if failures:
        sys.exit(f"{failures} rows differ by more than is allowed")


if __name__ == "__main__":
    main()
