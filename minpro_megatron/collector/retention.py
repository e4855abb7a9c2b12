"""When the journal loses what no restart of the run needs any more."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from minpro_megatron.buffer.journal import Journal
from minpro_megatron.buffer.journal_errors import JournalError
from minpro_megatron.buffer.journal_pruning import Pruned
from minpro_megatron.collector.leases import Conflict
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import RunBlocked


class JournalRetention:
    """Prunes the journal in the background, one piece after the other. Use it in the collector's event loop."""

    def __init__(self, config: RunConfig, journal: Journal, fail: Callable[[str], Awaitable[None]]) -> None:
        """`fail` is called with the message of an error."""
        self.resumed_from = 0  # the version of the checkpoint that this start resumed from
        self.pruning: asyncio.Task[None] | None = None
        self._settings = config.collector
        self._journal = journal
        self._has_files = config.model.routing_replay == "rollout" or config.sampling.top_k > 0
        self._fail = fail
        self._writes_checkpoints = config.checkpoint.saves_before_end and config.debug.trainer == "megatron"
        self._checkpoints_begun: set[int] = set()  # by this trainer

    def checkpoint_begun(self, version: int) -> None:
        self._checkpoints_begun.add(version)

    def checkpoint_complete(self, version: int, next_step: int) -> None:
        """Groups that steps before the checkpoint's consumed are not needed to resume. Raises Conflict for a checkpoint
        that was not started: pruning might remove something that is still needed."""
        if version not in self._checkpoints_begun:
            raise Conflict(f"checkpoint of version {version}: it was not started")
        self._start(version, next_step)

    def consumed(self, next_step: int) -> None:
        """A run that writes no checkpoints samples again after a crash, from its start or its initial checkpoint."""
        if not self._writes_checkpoints:
            self._start(self.resumed_from or next_step, next_step)

    def _start(self, needed_from: int, next_step: int) -> None:
        """Prunes what steps before `needed_from` consumed: routes and kept ids at once, the rest after
        journal_keep_steps steps."""
        keep = self._settings.journal_keep_steps
        due = {Pruned.EVERYTHING: min(needed_from, next_step - keep) if keep else 0}
        if self._has_files and not self._settings.journal_keep_routes:
            due[Pruned.FILES] = needed_from
        due = {what: before_step for what, before_step in due.items() if before_step > 0}
        if due:
            # During the trainer's next step: gigabytes take minutes, and new records meanwhile wait for one piece.
            self.pruning = asyncio.create_task(self._prune(due, self.pruning))

    async def _prune(self, due: Mapping[Pruned, int], earlier: "asyncio.Task[None] | None") -> None:
        if earlier is not None:
            await earlier
        try:
            for what, before_step in due.items():
                await self._journal.prune(before_step, what)
        except (JournalError, RunBlocked) as error:
            await self._fail(str(error))
