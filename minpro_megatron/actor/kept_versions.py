"""The policy version of the trainer's current weights, and the earlier versions that may still be requested."""

from collections.abc import Iterator
from contextlib import contextmanager

from minpro_megatron.actor.policy import Policy
from minpro_megatron.config.staleness import StalenessConfig


class KeptVersions:
    """Snapshots of earlier policy versions. `in_place` is the version of the weights that are in the model now."""

    def __init__(self, policy: Policy, staleness: StalenessConfig) -> None:
        self._policy = policy
        self._settings = staleness
        self.in_place = 0

    def keep(self) -> None:
        """Save a snapshot of the current weights, which an update is about to change: later batches are scored with
        them, and servers that restart meanwhile receive them."""
        self._policy.take_snapshot(self._name(self.in_place))

    @contextmanager
    def weights_of(self, version: int) -> Iterator[None]:
        """Context manager: inside it the model has the weights of `version`."""
        if version == self.in_place:
            yield
            return
        before, self.in_place = self.in_place, version
        with self._policy.use_snapshot(self._name(version)):
            yield
        self.in_place = before

    def _name(self, version: int) -> str:
        """The name of the version's snapshot. There is one for each version that may still be requested: in delay mode
        only the version of the servers."""
        settings = self._settings
        return "sampling" if settings.mode == "delay" else f"sampling {version % (settings.max_staleness + 1)}"
