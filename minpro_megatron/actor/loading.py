"""Builds a run's policy from its settings and loads its initial weights."""

from minpro_megatron.actor.model import DTYPES, build_model, features_of
from minpro_megatron.actor.policy import Policy
from minpro_megatron.checkpoints.converted_model import load_weights
from minpro_megatron.config.run import RunConfig
from minpro_megatron.models.architecture import Architecture, read_architecture
from minpro_megatron.parallel.mesh import Mesh


def load_policy(config: RunConfig, mesh: Mesh, *, records_log_probs: bool = False) -> tuple[Policy, Architecture]:
    """This rank's share of the model of `config.model`; `records_log_probs` as in Policy. Collective.

    Raises ValueError for a model that cannot be read, that the mesh cannot divide, or whose converted weights do not
    match it.
    """
    architecture = read_architecture(config.model.hf_path)
    chunks = build_model(architecture, mesh, DTYPES[config.model.dtype], features_of(config))
    load_weights(chunks, architecture, config.model.megatron_path, mesh)
    return Policy(config, architecture, chunks, mesh, records_log_probs=records_log_probs), architecture
