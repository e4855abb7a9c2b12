"""Which policy version's weights are in place on the trainer, and the earlier ones that may still be asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

from minpro_megatron.actor.policy import Policy
from minpro_megatron.config.rollout import StalenessConfig


class KeptVersions:
    """`in_place` is the version of the weights in place."""

    def __init__(self, policy: Policy, staleness: StalenessConfig) -> None:
        self._policy = policy
        self._settings = staleness
        self.in_place = 0

    def keep(self) -> None:
        """Keep the weights in place, which an update is about to change: batches are still to be scored with them, and
        servers that come back meanwhile get them."""
        self._policy.keep_weights(self._name(self.in_place))

    @contextmanager
    def of(self, version: int) -> Iterator[None]:
        """Within: the weights of `version` are in place."""
        if version == self.in_place:
            yield
            return
        before, self.in_place = self.in_place, version
        with self._policy.kept_weights(self._name(version)):
            yield
        self.in_place = before

    def _name(self, version: int) -> str:
        """There are as many snapshots as versions that may still be asked for: one in delay mode, the servers'."""
        settings = self._settings
        return "sampling" if settings.mode == "delay" else f"sampling {version % (settings.max_staleness + 1)}"
