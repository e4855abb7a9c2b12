"""What is rehearsed: the settings of a run, and one rank of it."""

from dataclasses import dataclass

from minpro_megatron.config.run import RunConfig

# Names of phases
UPDATE = "update"
PUBLISH = "publish"


@dataclass(frozen=True)
class Rehearsed:
    """`layers`: of the model, 0 for all of them. `imbalance`: rows that experts get over rows of even routing."""

    recipe: str
    config: RunConfig
    rank: int
    layers: int = 0
    imbalance: float = 1.0

    @property
    def rows(self) -> int:
        """Micro-batches per data-parallel rank: enough to fill the pipeline."""
        return 2 * self.config.parallel.pipeline
