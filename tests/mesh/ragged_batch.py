"""A small mini-batch with everything that sharding can trip over."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from transformers import PreTrainedModel

from minpro_megatron.batching.token_sequence import TokenSequence
from minpro_megatron.objective.advantages import group_advantages
from tests.mesh.reference import COMMON, response_log_probs

PROMPTS = (3, 8, 1, 5)  # tokens of each group's prompt
RESPONSES = ((300, 1, 47), (5, 210, 33), (90, 2, 16, 61), (149, 12))
REWARDS = ((1.0, 0.0, 0.5), (1.0, 1.0, 1.0), (0.0, 1.0, 0.0, 0.0), (1.0, 0.0))  # the second: all equal
WHOLLY_MASKED = 61  # the response of so many tokens has no trained one
MASKED_HEAD = {300: 130, 149: 80}  # the first trained token lies far from the first token, in another rank's piece
SEED = 4  # of some, that with the least cancellation: in float32 any computation is within 5e-6 of float64
DRIFT = 0.7  # standard deviation of the log-ratios, nats
SHORTEST_ROW = 352  # tokens that hold the longest sequence on every mesh

Groups = list[list[TokenSequence]]


def ragged_groups(model: PreTrainedModel, temperature: float, seed: int = SEED) -> Groups:
    """[group][response]: lengths 1 to 300, holes in the masks, a group of equal rewards, stale behavior log-probs."""
    random = np.random.default_rng(seed)
    groups: Groups = []
    for prompt_tokens, responses, rewards in zip(PROMPTS, RESPONSES, REWARDS, strict=True):
        prompt = random.integers(0, COMMON["vocab_size"], prompt_tokens).astype(np.int32)
        advantages = group_advantages(rewards)
        groups.append([_sequence(random, prompt, *one) for one in zip(responses, advantages, strict=True)])
    ordered = in_order(groups)
    starts = np.cumsum([0, *(len(sequence.response_ids) for sequence in ordered)])
    placed = (
        replace(_with_behavior(random, sequence, model, temperature), first_slot=int(start))
        for sequence, start in zip(ordered, starts[:-1], strict=True)
    )
    return [[next(placed) for _ in group] for group in groups]


def in_order(groups: Groups) -> list[TokenSequence]:
    return [sequence for group in groups for sequence in group]


def shuffled(groups: Groups, seed: int) -> list[TokenSequence]:
    """The same sequences, groups in another order, and the responses of each too."""
    random = np.random.default_rng(seed)
    mixed = [[group[index] for index in random.permutation(len(group))] for group in groups]
    return in_order([mixed[index] for index in random.permutation(len(mixed))])


def _sequence(random: np.random.Generator, prompt: np.ndarray, length: int, advantage: float) -> TokenSequence:
    mask = (random.random(length) > 0.2).astype(np.float32)
    mask[-1] = 1
    mask[: MASKED_HEAD.get(length, 0)] = 0
    if length == WHOLLY_MASKED:
        mask[:] = 0
    return TokenSequence(
        prompt_ids=prompt,
        response_ids=random.integers(0, COMMON["vocab_size"], length).astype(np.int32),
        loss_mask=mask,
        behavior_log_probs=np.zeros(length, np.float32),
        rollout_log_probs=np.zeros(length, np.float32),
        advantage=float(advantage),
        first_slot=0,
    )


@torch.no_grad()
def _with_behavior(
    random: np.random.Generator, sequence: TokenSequence, model: PreTrainedModel, temperature: float
) -> TokenSequence:
    current = response_log_probs(model, sequence, temperature).numpy()
    drift = random.normal(0, DRIFT, len(current))
    # of masked tokens the numbers must not matter
    behavior = np.where(sequence.loss_mask > 0, current + drift, 37.0).astype(np.float32)
    return replace(sequence, behavior_log_probs=behavior)


def smallest_routing_gap(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> float:
    """By how much, at least, the last chosen expert's logit exceeds that of the first one left out.

    Where two experts are as good as equal, rounding decides between them, and no two computations agree.
    """
    top = model.config.num_experts_per_tok
    smallest = float("inf")
    for sequence in sequences:
        ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()
        with torch.no_grad():
            layers = model(ids[None], output_router_logits=True).router_logits
        for logits in layers:
            ranked = logits.sort(dim=-1, descending=True).values
            smallest = min(smallest, float((ranked[..., top - 1] - ranked[..., top]).min()))
    return smallest
