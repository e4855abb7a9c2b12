"""`Ranks` whose ranks are threads: what only one of several ranks asks for fails instead of hanging."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

DEADLINE_S = 5.0


class LockstepRanks:
    """One rank among several; each holds one of these and runs in a thread of its own."""

    def __init__(self, rank: int, barrier: threading.Barrier, board: list) -> None:
        self._rank, self._barrier, self._board = rank, barrier, board

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self._shown_by_all("sum", values)).sum(0)

    def max(self, values: Tensor) -> Tensor:
        return torch.stack(self._shown_by_all("max", values)).amax(0)

    def gather(self, values: Tensor) -> Tensor:
        return torch.cat(self._shown_by_all("gather", values))

    def _shown_by_all(self, what: str, values: Tensor) -> list[Tensor]:
        self._board[self._rank] = (what, values.clone())
        self._barrier.wait(DEADLINE_S)
        shown = list(self._board)
        self._barrier.wait(DEADLINE_S)  # nobody writes before all have read
        assert {name for name, _ in shown} == {what}, f"ranks ask for different things: {shown}"
        return [one for _, one in shown]


def on_ranks[Part, Result](function: Callable[[Part, LockstepRanks], Result], parts: Sequence[Part]) -> list[Result]:
    """`function(part, ranks)` on as many ranks as there are parts."""
    barrier, board = threading.Barrier(len(parts)), [None] * len(parts)

    def run(rank: int) -> Result:
        try:
            return function(parts[rank], LockstepRanks(rank, barrier, board))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(parts)) as threads:
        return list(threads.map(run, range(len(parts))))
