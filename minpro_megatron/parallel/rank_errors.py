"""What a rank does with an error that ends it: torchrun and the supervisor learn which rank failed, and why."""

import os
from collections.abc import Callable

from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, record

from minpro_megatron.monitor.rank_failures import write_rank_failure


class _RankErrors(ErrorHandler):
    """Torch's own, which writes torchrun's file and lets a crash of the interpreter print its stacks; and in addition
    the rank's failure for the supervisor: torchrun's file has neither the rank nor a time below a second."""

    def record_exception(self, e: BaseException) -> None:
        super().record_exception(e)
        write_rank_failure(e, int(os.environ.get("RANK", 0)))


def recorded(work: Callable[[], None]) -> None:
    """Does the work; an error that it raises is recorded and raised again."""
    record(work, _RankErrors())()
