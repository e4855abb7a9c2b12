"""Version 0: the servers have loaded the run's initial weights from a Hugging Face folder before the trainer sends them
its own, which were converted from that folder. Both must have the same bits."""

import logging
from collections.abc import Mapping

import torch

from minpro_megatron.checkpoints.manifest import read_manifest
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import WRONG_INPUT
from minpro_megatron.models.architecture import read_architecture
from minpro_megatron.publishing.sender import PublishError
from minpro_megatron.weights.hf_files import HfReader
from minpro_megatron.weights.table import entries

log = logging.getLogger(__name__)


class OtherInitialWeights(PublishError):
    """The two sets of files hold different weights: a job does not start the run again, because they stay different."""

    exit_status = WRONG_INPUT


def conversion_is_exact(stored: str, trained: str, served: str) -> bool:
    """Whether servers that load a folder in the dtype `served` hold the bits that they receive from a trainer in
    `trained`, which reads a checkpoint that was converted from that folder in `stored`. Each is float32 or bfloat16.

    A second rounding to bfloat16 changes nothing, so only servers in float32 can see one on the trainer's way.
    """
    return served == "bfloat16" or stored == trained == "float32"


def routers_are_exact(hf_path: str, stored: str, trained: str) -> bool:
    """The same of the routers, which servers of a model with sigmoid routing hold in float32 whatever their dtype is:
    they load what the folder has, and receive what the conversion and the trainer have rounded."""
    architecture = read_architecture(hf_path)
    if not architecture.sigmoid_routing or stored == trained == "float32":
        return True
    tensors = HfReader(hf_path).tensors
    routers = [
        name for entry in entries(architecture) if entry.megatron.endswith(".router.weight") for name in entry.hf
    ]
    return all(tensors[name].dtype == torch.bfloat16 for name in routers)


def refuse_other_weights(config: RunConfig, loaded: Mapping[int, str], received: Mapping[int, str]) -> None:
    """Compares the servers' checksums, by tensor-parallel size, before and after they received version 0. Raises
    OtherInitialWeights if one differs although nothing was rounded on the way."""
    differing = [size for size, checksum in received.items() if loaded.get(size, checksum) != checksum]
    if not differing:
        return
    size = differing[0]
    model, stored = config.model, read_manifest(config.model.megatron_path).dtype
    shown = f"checksum {loaded[size][:12]} after loading model.hf_path, {received[size][:12]} after the publication"
    exact = conversion_is_exact(stored, model.dtype, config.server.dtype)
    if not (exact and routers_are_exact(model.hf_path, stored, model.dtype)):
        log.info("version 0: the trainer's weights are rounded and the servers' were not: %s", shown)
        return
    raise OtherInitialWeights(
        f"publishing version 0: the trainer's weights are not those of the servers ({shown}), although nothing is "
        f"rounded between them: model.megatron_path = {model.megatron_path} may hold other weights than model.hf_path "
        f"= {model.hf_path}; convert it again, or set publish.at_start to false to start without this check"
    )
