"""Progress display of a job whose size is known in bytes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def byte_progress(what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Bytes done, speed and time left on standard error while the block runs; the callback adds bytes done."""
    columns = [
        TextColumn("{task.description:9}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)
