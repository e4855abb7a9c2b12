"""Checks the settings model.megatron, optimizer.megatron and parallel.ddp with Megatron-Core's own classes.

    python -m minpro_megatron.actor.settings_check < run.json > ["problem", ...]

It runs in a process of its own, because importing Megatron-Core takes seconds. The configurations are built as a rank
builds them, so that Megatron's own checks of fields that do not go together are made too.
"""

import json
import sys
from collections.abc import Callable

import torch

from minpro_megatron.actor.backends.select import select_backend
from minpro_megatron.actor.megatron_configs import ddp_config, optimizer_config
from minpro_megatron.actor.model import DTYPES, features_of, transformer_config
from minpro_megatron.config.run import RunConfig
from minpro_megatron.errors import UserError
from minpro_megatron.models.architecture import read_architecture


def megatron_problems(config: RunConfig) -> list[str]:
    """A line for each field that Megatron-Core does not have or whose value it does not accept. model.hf_path must be
    readable."""
    dtype = DTYPES[config.model.dtype]

    def model() -> object:
        backend = select_backend(config.model.backend, torch.device(config.device), dtype)
        architecture = read_architecture(config.model.hf_path)
        return transformer_config(architecture, config.parallel, dtype, features_of(config), backend)

    builders: dict[str, Callable[[], object]] = {
        "model.megatron": model,
        "optimizer.megatron": lambda: optimizer_config(config.optimizer, dtype),
        "parallel.ddp": lambda: ddp_config(config.parallel),
    }
    found: list[str] = []
    for name, build in builders.items():
        try:
            build()
        except UserError as error:
            found += error.problems
        except (AssertionError, TypeError, ValueError) as error:  # Megatron's checks of its fields
            found.append(f"{name}: Megatron-Core refuses these fields: {error or type(error).__name__}; change them")
    return found


def main() -> int:
    """Read a run's settings from the standard input, and write the problems."""
    print(json.dumps(megatron_problems(RunConfig.from_json(sys.stdin.read()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
