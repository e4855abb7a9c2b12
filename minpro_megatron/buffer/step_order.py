"""The order of a run as the trainer sees it: when it fetches a batch, trains, publishes and saves.

This is the only place that states the order, but for the publication of version 0, or of a checkpoint's version, before
the first step (Trainer._begin). The trainer follows it, and so does everything that replaces the trainer:
the timer, the planner's simulation, the load benchmark and the trainers of the tests.

In delay mode with n = 2, a run of four global steps is:

    before the first step: fetch 0, fetch 1
    step 0: train 0, publish 1, fetch 2 (scored with version 0), save 1
    step 1: train 1, publish 2, fetch 3 (scored with version 1), save 2
    step 2: train 2, publish 3, save 3
    step 3: train 3, publish 4, save 4

Batch k is fetched n steps before its own step, at the end of step k - n. Version k - n samples batch k alone, so the
servers have nothing to do from the end of that batch to the next publication. Therefore the publication comes first,
and the batch is scored while the servers already sample the following one. The weights that sampled it are then the
trainer's last but one, of which it keeps a copy. A checkpoint comes after the scores, because it does not contain the
weights that compute them.

With n = 0, and in bounded mode, whose batches contain tokens up to the current version, a batch is fetched right before
its step.

Where trainer and servers share their GPUs they work in turns. The servers do everything that their version has to
sample, then release their memory, and take it back for the next version. With n = 2 a run of four global steps is then:

    step 0: release (version 0 has sampled batches 0, 1 and 2), fetch 0, fetch 1, fetch 2, train 0, save 1, publish 1
    step 1: release (version 1 has sampled batch 3), fetch 3 (scored with version 1), train 1, save 2, publish 2
    step 2: release (version 2 has nothing to sample but evaluations), train 2, save 3, publish 3
    step 3: release, train 3, save 4, publish 4

Each batch is sampled and scored with the same versions as above. The weights that sampled it are in place when it is
scored, so the trainer keeps no copy of earlier ones. A checkpoint copies the states from the device, which they leave
when the version is published, so it comes before that.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from minpro_megatron.config.staleness import StalenessConfig


@dataclass(frozen=True)
class Fetch:
    """Batch `batch` is fetched, and scored with the weights of policy version `version` in place."""

    batch: int
    version: int


@dataclass(frozen=True)
class Train:
    """Global step `step` trains on batch `step`."""

    step: int


@dataclass(frozen=True)
class Publish:
    """The weights are sent to the servers as `version`, once these have sampled what they were to sample before."""

    version: int


@dataclass(frozen=True)
class Release:
    """The servers have done all work of `version` and release their memory until the next version is published."""

    version: int


@dataclass(frozen=True)
class Save:
    """The step is reported, and saving a checkpoint of `version` may start."""

    version: int


Event = Release | Fetch | Train | Publish | Save


def steps_ahead(staleness: StalenessConfig) -> int:
    """The number of steps by which a batch is fetched before its own step."""
    return staleness.delay_steps if staleness.mode == "delay" else 0


@dataclass(frozen=True)
class StepOrder:
    """The order of global steps `first` to `num_steps` - 1; `ahead` is `steps_ahead` of the run. `in_turns`: trainer
    and servers share their GPUs."""

    num_steps: int
    ahead: int
    first: int = 0
    in_turns: bool = False

    @property
    def steps(self) -> range:
        return range(self.first, self.num_steps)

    def before_first_step(self) -> Iterator[Fetch]:
        """The batches that are fetched before the first step; in turns it is the first step that fetches them.

        >>> [fetch.batch for fetch in StepOrder(num_steps=6, ahead=2, first=3).before_first_step()]
        [3, 4]
        """
        if not self.in_turns:
            yield from self._fetches(self.first, self.first + self.ahead, self.first)

    def of_step(self, step: int) -> Iterator[Event]:
        """What happens in global step `step`, in order.

        >>> list(StepOrder(num_steps=4, ahead=2).of_step(1))
        [Train(step=1), Publish(version=2), Fetch(batch=3, version=1), Save(version=2)]
        """
        if self.in_turns:
            yield from self._turn(step)
            return
        if self.ahead == 0:
            yield Fetch(step, step)
        yield Train(step)
        yield Publish(step + 1)
        if self.ahead and step + self.ahead < self.num_steps:
            yield Fetch(step + self.ahead, step)
        yield Save(step + 1)

    def _turn(self, step: int) -> Iterator[Event]:
        yield Release(step)
        yield from self._fetches(step if step == self.first else step + self.ahead, step + self.ahead + 1, step)
        yield Train(step)
        yield Save(step + 1)
        yield Publish(step + 1)

    def _fetches(self, first: int, end: int, version: int) -> Iterator[Fetch]:
        """Of the batches `first` to `end` - 1, as far as the run has them."""
        for batch in range(first, min(end, self.num_steps)):
            yield Fetch(batch, version)
