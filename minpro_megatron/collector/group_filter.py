"""Which collected groups a step may train on; for every other one another prompt is sampled in its place."""

from typing import Protocol

import numpy as np

from minpro_megatron.config.run import RunConfig
from minpro_megatron.hooks.hook import Hook
from minpro_megatron.records import CollectedGroup


class FilterFunction(Protocol):
    """Whether a graded group is kept (`data.filter`). It must decide by the group alone, so that a group which is
    sampled again after a crash is treated alike."""

    def __call__(self, group: CollectedGroup, /) -> bool: ...


class GroupFilter:
    """The filters of a run: groups without a reward, groups of equal rewards where batch.dynamic_sampling drops them,
    and `data.filter`. Raises UserError if that function cannot be loaded."""

    def __init__(self, config: RunConfig) -> None:
        self._drops_equal_rewards = config.batch.dynamic_sampling
        self._hook = Hook("data.filter", config.data.filter) if config.data.filter else None
        self._function: FilterFunction | None = self._hook.load() if self._hook else None

    def keeps(self, group: CollectedGroup) -> bool:
        """Whether a step may train on the group. Raises HookError if the user's function returns no bool, and whatever
        it raises, with a note that names it."""
        if group.grading_problem:
            return False
        if self._drops_equal_rewards and len({response.reward for response in group.responses}) == 1:
            return False
        if self._hook is None or self._function is None:
            return True
        with self._hook.running():
            kept = self._function(group)
        if not isinstance(kept, bool | np.bool_):
            raise self._hook.error(f"it must return True (keep the group) or False, not {type(kept).__name__}")
        return bool(kept)
