"""Batches of collected groups with made-up numbers, for tests of what consumes them."""

import numpy as np

from minpro_megatron.records import Batch, CollectedGroup, IssuedGroup, Prompt, Response


def make_group(
    group_id: int,
    prompt_tokens: int,
    rewards: list[float],
    lengths: list[int],
    versions: list[int] | None = None,
    finish_reasons: list[str] | None = None,
) -> CollectedGroup:
    """A group whose token ids and log-probs tell group, response and place: 10000 g + 100 r + t."""
    issued = IssuedGroup(
        group_id=group_id,
        batch_index=0,
        policy_version=0,
        prompt=Prompt(id=str(group_id), source="test", text="1+1=", answer="2"),
        prompt_token_ids=np.arange(prompt_tokens, dtype=np.int32) + 7,
        sampling_seeds=list(range(len(rewards))),
    )
    responses = []
    for index, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        ids = 10_000 * group_id + 100 * index + np.arange(length)
        responses.append(
            Response(
                token_ids=ids.astype(np.int32),
                rollout_log_probs=-ids.astype(np.float32) / 1000,
                policy_versions=np.full(length, versions[index] if versions else 0, np.int32),
                finish_reason=finish_reasons[index] if finish_reasons else "stop",
                reward=reward,
            )
        )
    return CollectedGroup(issued=issued, responses=responses)


def make_batch() -> Batch:
    """Three groups of two responses of different lengths; the second group has equal rewards."""
    return Batch(
        index=4,
        groups=[
            make_group(1, 3, [1.0, 0.0], [5, 2]),
            make_group(2, 1, [1.0, 1.0], [1, 4]),
            make_group(3, 6, [0.0, 1.0], [3, 3]),
        ],
    )
