"""The checks when a global step has trained on its batch: every group has the staleness that the settings allow."""

import logging
from collections.abc import Sequence

import numpy as np

from minpro_megatron.buffer.staleness import Beginning, expected_staleness, staleness
from minpro_megatron.collector.leases import Conflict
from minpro_megatron.config.run import RunConfig
from minpro_megatron.records import Batch

log = logging.getLogger(__name__)


def checked_staleness(
    config: RunConfig, beginnings: Sequence[Beginning], batch: Batch, policy_version: int
) -> list[int]:
    """The staleness of each group of the batch, which was consumed with `policy_version`. Raises Conflict for a group
    whose staleness is not the expected one (delay mode) or above the limit (bounded mode)."""
    settings, step = config.staleness, batch.index
    expected = expected_staleness(step, settings.delay_steps, beginnings)
    exact = settings.mode == "delay"
    found = [staleness(policy_version, group.oldest_version) for group in batch.groups]
    for group, value in zip(batch.groups, found, strict=True):
        if value == expected if exact else 0 <= value <= settings.max_staleness:
            continue
        rule = f"instead of {expected}" if exact else f"above staleness.max_staleness = {settings.max_staleness}"
        raise Conflict(
            f"step {step}: group {group.issued.group_id}, sampled with version {group.oldest_version} and consumed "
            f"with version {policy_version}: staleness {value} {rule}"
        )
    return found


def log_batch(batch: Batch) -> None:
    responses = [response for group in batch.groups for response in group.responses]
    log.info(
        "step %d consumed %d groups, %d responses, %d tokens, mean reward %.4f",
        batch.index, len(batch.groups), len(responses), sum(len(response.token_ids) for response in responses),
        float(np.mean([response.reward for response in responses])),
    )  # fmt: skip
