"""Whether the ranks will be able to import what `model.backend` asks for."""

import subprocess
import sys
from collections.abc import Iterator

from minpro_megatron.config.run import RunConfig


def layer_backend_problems(config: RunConfig) -> Iterator[str]:
    """A line if Transformer Engine is asked for by name and cannot be imported, with the import's own error."""
    if config.model.backend != "transformer_engine":
        return
    # in a process of its own: it brings torch with it, and a broken library can end the process
    found = subprocess.run(
        [sys.executable, "-c", "import transformer_engine.pytorch"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        yield (
            f"model.backend = transformer_engine: it cannot be imported ({reason}); install it "
            "(environment/setup.sh does on machines with a GPU), or set model.backend to auto or torch"
        )
