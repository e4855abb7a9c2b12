"""Records the error that ends a rank, so that torchrun and the supervisor know which rank failed, and why."""

import os
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from minpro_megatron.monitor.rank_failures import write_rank_failure


class _RankErrors(ErrorHandler):
    """Torch's handler, which writes torchrun's file and makes a crash of the interpreter print its stacks. In addition
    this one writes the rank's failure for the supervisor: torchrun's file has no rank, and its time only whole
    seconds."""

    def record_exception(self, e: BaseException) -> None:
        super().record_exception(e)
        write_rank_failure(e, int(os.environ.get("RANK", 0)))


def record_errors(work: Callable[[], None]) -> None:
    """Calls `work`; an error that it raises is recorded and raised again."""
    record(work, _RankErrors())()
