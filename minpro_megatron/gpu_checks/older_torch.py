"""The checks on a machine whose torch is older than the pinned one: nothing can be installed there.

The functions below are newer than torch 2.11, the oldest version with which the checks have run (on a CPU). A check has
one rank, so no collective that they would be needed for is made.
"""

import torch.distributed as dist

_NEWER = ("set_timeout", "all_gather_single", "reduce_scatter_single")


def install() -> None:
    """Adds the functions that torch lacks, in this process."""
    for name in _NEWER:
        if not hasattr(dist, name):
            setattr(dist, name, _set_timeout if name == "set_timeout" else _refuse(name))


def _set_timeout(timeout: object, group: object = None) -> None:
    """Leaves the group's limit as it is: the process of a check has a limit of its own."""


def _refuse(name: str) -> object:
    def call(*arguments: object, **settings: object) -> None:
        raise NotImplementedError(f"torch.distributed.{name} needs a newer torch, and is not for one rank")

    return call
