"""Journals as runs leave them, for tests of what reads them."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from minpro_megatron.batching.supports import support_array
from minpro_megatron.buffer.journal import Journal
from minpro_megatron.prompts.prompts import PromptStream
from minpro_megatron.records import Batch, CollectedGroup
from tests.support.rollout_fakes import NUM_PROMPTS, collected, run_config, tokenized_prompts


@dataclass
class StoredRun:
    """The groups of a run whose journal is in `run_dir`, by the step that consumed them; `rest` was not consumed."""

    run_dir: Path
    steps: list[Batch] = field(default_factory=list)
    rest: list[CollectedGroup] = field(default_factory=list)

    @property
    def groups(self) -> list[CollectedGroup]:
        return [*(group for batch in self.steps for group in batch.groups), *self.rest]


def behavior(group: CollectedGroup) -> list[np.ndarray]:
    """Behavior log-probs that differ from the rollout log-probs."""
    return [response.rollout_log_probs - np.float32(0.25) for response in group.responses]


def trained(group: CollectedGroup) -> list[np.ndarray]:
    """The policy's log-probs at the update: e times as likely as `behavior` has it, but for the first token."""
    found = [log_probs + np.float32(1) for log_probs in behavior(group)]
    for log_probs in found:
        log_probs[0] = np.nan
    return found


def write_run(
    run_dir: Path,
    num_steps: int = 2,
    *,
    change: Callable[[CollectedGroup], CollectedGroup] = lambda group: group,
    scored: bool = True,
    while_open: Callable[[Journal, StoredRun], Awaitable[None]] | None = None,
) -> StoredRun:
    """Journals `num_steps` consumed batches of version 0, one that is collected only (`scored` False: and nothing is
    consumed), and one issued group. `change` is applied to each collected group."""
    run = StoredRun(run_dir)
    stream = PromptStream(tokenized_prompts(9), run_config(run_dir))

    async def main() -> None:
        journal = await Journal.open(run_dir)
        try:
            for index in range(num_steps + 1):
                issued = [stream.group(index * NUM_PROMPTS + place, index, 0) for place in range(NUM_PROMPTS)]
                await journal.issue(issued)
                groups = [change(collected(group)) for group in issued]
                for group in groups:
                    await journal.collect(group, accepted=True)
                if index == num_steps or not scored:
                    run.rest += groups
                    continue
                batch = Batch(index=index, groups=groups)
                await journal.score(index, [(group, behavior(group)) for group in groups])
                await journal.consume(batch, [index] * NUM_PROMPTS, (), [trained(group) for group in groups])
                run.steps.append(batch)
            await journal.issue([stream.group((num_steps + 1) * NUM_PROMPTS, -1, 0)])
            if while_open:
                await while_open(journal, run)
        finally:
            await journal.close()

    asyncio.run(main())
    return run


def with_kept_ids(group: CollectedGroup) -> CollectedGroup:
    """The group as truncated sampling gives it: each token is among two ids."""
    responses = []
    for response in group.responses:
        ids = response.token_ids
        supports = support_array(np.full(len(ids), 2), np.stack([ids, (ids + 1) % 24], axis=1).reshape(-1))
        responses.append(msgspec.structs.replace(response, supports=supports))
    return msgspec.structs.replace(group, responses=responses)


def with_versions(group: CollectedGroup, versions: list[int]) -> CollectedGroup:
    """The group with its first response sampled by these versions, token by token."""
    first, *others = group.responses
    tokens = np.arange(len(versions), dtype=np.int32)
    changed = msgspec.structs.replace(
        first,
        token_ids=tokens,
        rollout_log_probs=-tokens.astype(np.float32),
        policy_versions=np.asarray(versions, np.int32),
    )
    return msgspec.structs.replace(group, responses=[changed, *others])
