"""One control request to many servers at once, in threads."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from typing import Any

from minpro_megatron.serving.control import ControlError, NoAnswerInTime, ServerControl


class ServersFailed(ControlError):
    """Some of the requests to several servers failed; `failures` has a line for each failed one, by server index."""

    def __init__(self, failures: Mapping[int, str]) -> None:
        self.failures = dict(failures)
        super().__init__("; ".join(self.failures.values()))


class PendingCalls:
    """Control requests in flight, one per server."""

    def __init__(self, indices: Sequence[int], futures: Sequence[Future[Any]]) -> None:
        self._indices = list(indices)
        self.futures = list(futures)

    def failures(self) -> dict[int, str]:
        """The messages of the requests that have failed so far, by server index."""
        errors = {
            index: future.exception()
            for index, future in zip(self._indices, self.futures, strict=True)
            if future.done()
        }
        for error in errors.values():
            if error is not None and not isinstance(error, ControlError):
                raise error
        return {index: str(error) for index, error in errors.items() if error is not None}

    def late(self) -> list[int]:
        """The indices of servers whose answer did not arrive within the request's time limit."""
        found = zip(self._indices, self.futures, strict=True)
        return [index for index, future in found if future.done() and isinstance(future.exception(), NoAnswerInTime)]

    def unfinished(self) -> list[int]:
        """The indices of servers that have not answered yet."""
        return [index for index, future in zip(self._indices, self.futures, strict=True) if not future.done()]

    def results(self) -> dict[int, Any]:
        """Waits for all requests; returns the results of the successful ones, by server index."""
        wait_for_futures(self.futures)
        failed = self.failures()
        found = zip(self._indices, self.futures, strict=True)
        return {index: future.result() for index, future in found if index not in failed}

    def wait(self) -> list[Any]:
        """Waits for all requests and returns the results in the servers' order. Raises ServersFailed."""
        results = self.results()
        failed = self.failures()
        if failed:
            raise ServersFailed(failed)
        return [results[index] for index in self._indices]


def in_thread[Result](function: Callable[..., Result], *arguments: Any, **named: Any) -> Future[Result]:
    """Runs `function` in its own thread, which does not keep the process alive if it waits for a hung server."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments, **named))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="server-control").start()
    return future


def start_for_all(
    controls: Iterable[ServerControl],
    method: str,
    *,
    per_server: Sequence[Mapping[str, Any]] | None = None,
    **arguments: Any,
) -> PendingCalls:
    """Calls `method` on every server in threads; `per_server` holds arguments that differ between servers.

    For requests that the trainer must take part in: start them, broadcast, then call `wait()`.
    """
    controls = list(controls)
    own = [{} for _ in controls] if per_server is None else list(per_server)
    if len(own) != len(controls):
        raise ValueError(f"per_server has {len(own)} entries for {len(controls)} servers")
    calls = [
        in_thread(getattr(control, method), **arguments, **extra) for control, extra in zip(controls, own, strict=True)
    ]
    return PendingCalls([control.address.index for control in controls], calls)


def for_all(
    controls: Iterable[ServerControl],
    method: str,
    *,
    per_server: Sequence[Mapping[str, Any]] | None = None,
    **arguments: Any,
) -> list[Any]:
    """Calls `method` on every server at once; the results are in the servers' order. Raises ServersFailed.

    >>> for_all(controls, "pause_generation", mode="retract")  # doctest: +SKIP
    """
    return start_for_all(controls, method, per_server=per_server, **arguments).wait()
