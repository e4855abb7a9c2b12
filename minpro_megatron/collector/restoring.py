"""What a collector resumes from: the schedule and the unconsumed groups, from the journal and the prompts."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_restore import Needed, RestoredGroup
from minpro_megatron.buffer.schedule import Restored, Schedule, Slot, make_schedule
from minpro_megatron.buffer.staleness import RUN_START, Beginning, beginning_after
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.prompts.prompts import PromptStream
from minpro_megatron.records import CollectedGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestoredState:
    """The state of a run between two global steps. `num_groups` counts the issued groups that no step has consumed;
    those of them that are sampled already are in `groups`, by id."""

    schedule: Schedule
    beginnings: Sequence[Beginning]
    groups: dict[int, CollectedGroup]
    num_groups: int


async def restore_state(
    config: RunConfig,
    journal: Journal,
    stream: PromptStream,
    version: int,
    former_end: int | None,
) -> RestoredState:
    """The state at the checkpoint of `version`; arguments and errors as of Collector.restore."""
    delay_mode = config.staleness.mode == "delay"
    needed = Needed(routes=config.model.routing_replay == "rollout", supports=config.sampling.top_k > 0)
    found, next_group = await journal.restore(version, config.batch.num_prompts, delay_mode, needed)
    beginnings = await _restore_beginnings(config, journal, version, former_end)
    groups = {}
    for group in found:
        collected = _restore_group(config, stream, group)
        if collected is not None:
            groups[group.group_id] = collected
    restored = [
        Restored(Slot(group.group_id, group.batch_index, group.issued_version), bool(group.responses), group.dropped)
        for group in found
    ]
    schedule = make_schedule(config, version, restored, next_group, beginnings)
    return RestoredState(schedule, beginnings, groups, len(found))


async def _restore_beginnings(
    config: RunConfig, journal: Journal, version: int, former_end: int | None
) -> Sequence[Beginning]:
    """Delay mode: where the run was extended, now or before, and which version samples the batches there."""
    settings = config.staleness
    if settings.mode != "delay":
        return (RUN_START,)
    added = beginning_after(former_end, version, config.num_global_steps, settings.delay_steps)
    if added is not None:
        await journal.begin(added)
        log.info("the run is extended: version %d samples the batches from %d on", version, added.first_batch)
    return await journal.beginnings()


def _restore_group(config: RunConfig, stream: PromptStream, group: RestoredGroup) -> CollectedGroup | None:
    """The group with its prompt; None if it has no responses yet. Raises UserError if it had another prompt."""
    issued = stream.group(group.group_id, group.batch_index, group.issued_version)
    if group.prompt_id and issued.prompt.id != group.prompt_id:
        raise UserError(
            f"data.train_file = {config.data.train_file}: group {group.group_id} had the prompt "
            f"{group.prompt_id!r}, now it is {issued.prompt.id!r}; restore the file with which the run started"
        )
    return CollectedGroup(issued=issued, responses=group.responses) if group.responses else None
