"""Where the cluster's commands run."""

from typing import Any, Protocol


class Shell(Protocol):
    """Runs a command line, here or on a login node. The answer has stdout, stderr and return_code."""

    def run(self, command: str, hide: bool = True, warn: bool = False) -> Any: ...
