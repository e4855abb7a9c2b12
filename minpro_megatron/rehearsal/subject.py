"""What is rehearsed: the settings of a run, and one rank of it."""

from dataclasses import dataclass, replace

from minpro_megatron.config.objective import ImportedObjectiveConfig
from minpro_megatron.config.run import RunConfig, with_overrides
from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import Architecture
from minpro_megatron.models.known_models.find import find_architecture

# Names of phases
UPDATE = "update"
PUBLISH = "publish"
# of a rank that shares its GPU with servers (server.placement), in their order: before and after PUBLISH
PARK_STATES = "optimizer states to the host"
CANARIES = "score canaries"
PARK_WEIGHTS = "weights to the host"
RETURN = "all back to the device"


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

    def checked(self) -> tuple[RunConfig, Architecture]:
        """The settings with Transformer Engine's layers, and the model. Raises UserError for a recipe or a rank that
        cannot be rehearsed."""
        config = self.config
        if config.device != "cuda":
            raise UserError(
                f"device = {config.device}: a rehearsal is of ranks on GPUs; give a recipe for them, or device=cuda"
            )
        if config.model.dtype != "bfloat16":
            raise UserError(f"model.dtype = {config.model.dtype}: a rehearsal is of bfloat16; set model.dtype=bfloat16")
        if isinstance(config.objective, ImportedObjectiveConfig):
            raise UserError(
                f"objective.name = {config.objective.name}: the results of an imported objective are checked, and a "
                "rehearsal has no values to check; rehearse an objective of the project"
            )
        if not 0 <= self.rank < config.parallel.world_size:
            raise UserError(f"rank = {self.rank}: the mesh has ranks 0 to {config.parallel.world_size - 1}")
        architecture = find_architecture(config.model.hf_path)
        if self.layers:
            architecture = replace(architecture, num_layers=self.layers)
        return with_overrides(config, ["model.backend=transformer_engine"]), architecture
