"""Evaluation during a run: pass@1 of one policy version, sampled in the same way as the training groups."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from minpro_megatron.config.reward import RIGHT_REWARD, is_right
from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.evaluation.pass_at_k import mean_pass_at_k
from minpro_megatron.files.replacement import replace_file
from minpro_megatron.records import CollectedGroup, EvaluationResult, IssuedGroup, Prompt

FILE_NAME = "evaluations.jsonl"
# The name of the run's own held-out prompts, in place of a benchmark's name.
HELDOUT = ""

CollectGroup = Callable[[IssuedGroup], Awaitable[CollectedGroup]]


class EvaluationNotGraded(RuntimeError):
    """An evaluation has no result because the grader failed for all of its responses."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """What an evaluation keeps of a response; `problem` is why a response of its group has no reward."""

    reward: float
    num_tokens: int
    problem: str


def evaluation_groups(
    prompts: Sequence[tuple[Prompt, np.ndarray]],
    samples_per_prompt: int,
    run_seed: int,
    policy_version: int,
    benchmark: str = HELDOUT,
    *,
    max_group_size: int,
) -> list[IssuedGroup]:
    """Each prompt's samples in groups of at most `max_group_size`, with different sampling seeds for every policy
    version. `group_id` is the prompt's position, the same for all its groups; `batch_index` is -1.

    A group is one request to a server. With all samples of a prompt in one group, 128 responses would have to end
    within server.request_timeout_s, which is meant for a training group.
    """
    purpose = f"evaluation/{benchmark}" if benchmark else "evaluation"
    return [
        IssuedGroup(
            group_id=place,
            batch_index=-1,
            policy_version=policy_version,
            prompt=prompt,
            prompt_token_ids=token_ids,
            sampling_seeds=[
                derive_seed(run_seed, purpose, policy_version, place, sample)
                for sample in range(first, min(first + max_group_size, samples_per_prompt))
            ],
            is_evaluation=True,
        )
        for place, (prompt, token_ids) in enumerate(prompts)
        for first in range(0, samples_per_prompt, max_group_size)
    ]


async def evaluate(
    groups: Sequence[IssuedGroup],
    collect_group: CollectGroup,
    benchmark: str = HELDOUT,
    right_reward: float = RIGHT_REWARD,
) -> EvaluationResult:
    """pass@1 and mean reward over the prompts of the groups, which have the same number of samples each. The time
    includes waiting for servers that are busy with training groups.

    Raises EvaluationNotGraded if no response could be graded, and the first error of `collect_group`; the other groups
    are then cancelled.
    """
    start = time.monotonic()
    try:
        async with asyncio.TaskGroup() as tasks:
            pending = [tasks.create_task(_collect(collect_group, group)) for group in groups]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    of_prompts: dict[int, list[_Sample]] = {}
    for group, task in zip(groups, pending, strict=True):
        of_prompts.setdefault(group.group_id, []).extend(task.result())
    samples = list(of_prompts.values())
    samples_per_prompt = len(samples[0])
    rewards = [sample.reward for of_prompt in samples for sample in of_prompt]
    if all(math.isnan(reward) for reward in rewards):
        what = f"benchmark {benchmark}" if benchmark else "held-out prompts"
        raise EvaluationNotGraded(
            f"evaluation of version {groups[0].policy_version}, {what}: none of the {len(rewards)} responses could be "
            f"graded: {samples[0][0].problem}; correct the grader or the answers in the file"
        )
    num_correct = [sum(is_right(sample.reward, right_reward) for sample in of_prompt) for of_prompt in samples]
    pass_at_1 = mean_pass_at_k(samples_per_prompt, num_correct, k=1)
    lengths = [sample.num_tokens for of_prompt in samples for sample in of_prompt]
    return EvaluationResult(
        policy_version=groups[0].policy_version,
        benchmark=benchmark,
        pass_at_1=pass_at_1.mean,
        standard_error=pass_at_1.standard_error,
        mean_reward=float(np.mean(with_lowest(np.asarray(rewards)))),
        not_graded=sum(map(math.isnan, rewards)),
        num_prompts=len(samples),
        samples_per_prompt=samples_per_prompt,
        mean_response_tokens=float(np.mean(lengths)),
        wall_time_s=time.monotonic() - start,
    )


def with_lowest(rewards: np.ndarray) -> np.ndarray:
    """`rewards` as float64, with NaN replaced by 0 or the lowest reward, whichever is lower: a response that could not
    be graded must not count for more than a wrong one, or hanging the grader would pay off. 0 is included because all
    wrong responses may be among the ungraded ones."""
    return np.where(np.isnan(rewards), min(0.0, np.nanmin(rewards, initial=0.0)), rewards)


async def _collect(collect_group: CollectGroup, group: IssuedGroup) -> list[_Sample]:
    # The tokens are dropped at once: those of all samples together take gigabytes.
    collected = await collect_group(group)
    return [
        _Sample(response.reward, len(response.token_ids), collected.grading_problem) for response in collected.responses
    ]


def append_result(run_dir: Path, result: EvaluationResult) -> None:
    """Adds one line to `run_dir/evaluations.jsonl`."""
    with (Path(run_dir) / FILE_NAME).open("ab") as file:
        file.write(msgspec.json.encode(result) + b"\n")


def write_results(run_dir: Path, results: Sequence[EvaluationResult]) -> None:
    """Replaces the content of `run_dir/evaluations.jsonl` by these results."""
    replace_file(Path(run_dir) / FILE_NAME, "".join(msgspec.json.encode(result).decode() + "\n" for result in results))
