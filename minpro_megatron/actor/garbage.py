"""Python's garbage collection at the same moments on all ranks.

A collection takes tenths of a second with the objects of a training process. By itself Python starts one whenever
enough objects were made, on each rank at another moment, and with tensor, expert and pipeline parallelism the other
ranks wait for it every time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_together() -> Iterator[None]:
    """Context manager: inside it garbage is collected by `collect` only. Objects that exist already are not searched
    again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect() -> None:
    """Collects garbage, where Python does not by itself. Every rank calls it at the same moment."""
    if not gc.isenabled():
        gc.collect()
