"""What the fork server imports once for all ranks: also what a rank would import when it first needs it, which would
cost each rank of each mesh a quarter of a second."""

import gc
import importlib
import logging
import warnings

PRELOADED = (
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.models.mimo.optimizer",  # which Megatron's optimizer imports
    "minpro_megatron.actor.backends.torch_backend",
    "minpro_megatron.actor.model",
    "minpro_megatron.actor.policy",
    "minpro_megatron.checkpoints.converted_model",
    "minpro_megatron.checkpoints.run_checkpoints",
    "minpro_megatron.publishing.gather",
    "tests.mesh.gradients",
    "tests.mesh.reference",  # with transformers: seconds for every rank, where test modules import it
    "torch._dynamo.backends.inductor",  # these two by the first call of a compiled function
    "torch.export._trace",
    "torch.utils.serialization.config",
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core announces what is not installed
    for name in PRELOADED:
        importlib.import_module(name)

logging.getLogger("megatron.core").setLevel(logging.ERROR)
gc.collect()
gc.freeze()  # a garbage collection of a rank would go through all of this, and copy its memory pages
