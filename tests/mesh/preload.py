"""What the fork server imports once for all ranks."""

import logging
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron-core announces what is not installed

    import minpro_megatron.actor.policy
    import minpro_megatron.checkpoints.converted_model
    import minpro_megatron.publishing.gather  # noqa: F401
    import tests.mesh.reference  # noqa: F401  with transformers: seconds for every rank, where test modules import it

logging.getLogger("megatron.core").setLevel(logging.ERROR)
