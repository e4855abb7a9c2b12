"""Evaluation inside a run: pass@1 of one policy version, sampled the way the training groups are."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from minpro_megatron.config.seeds import derive_seed
from minpro_megatron.evaluation.pass_at_k import mean_pass_at_k
from minpro_megatron.monitor.files import replace_file
from minpro_megatron.records import CollectedGroup, EvaluationResult, IssuedGroup, Prompt

FILE_NAME = "evaluations.jsonl"
# In place of a benchmark's name: the run's own held-out prompts.
HELDOUT = ""
# A response counts as right from this reward on; rewards of held-out prompts are 0 or 1.
RIGHT_REWARD = 1.0

CollectGroup = Callable[[IssuedGroup], Awaitable[CollectedGroup]]


def evaluation_groups(
    prompts: Sequence[tuple[Prompt, np.ndarray]],
    samples_per_prompt: int,
    run_seed: int,
    policy_version: int,
    benchmark: str = HELDOUT,
) -> list[IssuedGroup]:
    """One group a prompt, with sampling seeds of its own for every policy version. `batch_index` is -1."""
    purpose = f"evaluation/{benchmark}" if benchmark else "evaluation"
    return [
        IssuedGroup(
            group_id=place,
            batch_index=-1,
            policy_version=policy_version,
            prompt=prompt,
            prompt_token_ids=token_ids,
            sampling_seeds=[
                derive_seed(run_seed, purpose, policy_version, place, sample) for sample in range(samples_per_prompt)
            ],
        )
        for place, (prompt, token_ids) in enumerate(prompts)
    ]


async def evaluate(
    groups: Sequence[IssuedGroup], collect_group: CollectGroup, benchmark: str = HELDOUT
) -> EvaluationResult:
    """pass@1 over the groups. The time includes waiting for servers that are busy with training groups."""
    start = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        pending = [tasks.create_task(_collect(collect_group, group)) for group in groups]
    collected = [task.result() for task in pending]
    samples_per_prompt = len(groups[0].sampling_seeds)
    num_correct = [sum(response.reward >= RIGHT_REWARD for response in group.responses) for group in collected]
    pass_at_1 = mean_pass_at_k(samples_per_prompt, num_correct, k=1)
    lengths = [len(response.token_ids) for group in collected for response in group.responses]
    return EvaluationResult(
        policy_version=groups[0].policy_version,
        benchmark=benchmark,
        pass_at_1=pass_at_1.mean,
        standard_error=pass_at_1.standard_error,
        num_prompts=len(groups),
        samples_per_prompt=samples_per_prompt,
        mean_response_tokens=float(np.mean(lengths)),
        wall_time_s=time.monotonic() - start,
    )


async def _collect(collect_group: CollectGroup, group: IssuedGroup) -> CollectedGroup:
    return await collect_group(group)


def append_result(run_dir: Path, result: EvaluationResult) -> None:
    """Adds one line to `run_dir/evaluations.jsonl`."""
    with (Path(run_dir) / FILE_NAME).open("ab") as file:
        file.write(msgspec.json.encode(result) + b"\n")


def write_results(run_dir: Path, results: Sequence[EvaluationResult]) -> None:
    """`run_dir/evaluations.jsonl` holds these results and no others."""
    replace_file(Path(run_dir) / FILE_NAME, "".join(msgspec.json.encode(result).decode() + "\n" for result in results))
