"""Servers give the memory of their GPUs to the trainer, and take it back.

SGLang 0.5.23 ends when memory is released while a request is under way. Therefore generation is paused first, which
ends what may be left, such as a health check or a request that its group has abandoned. The proof that the server is
idle is its own: it flushes its cache under exactly the condition under which it may release its memory. New requests
wait until `continue_generation`, so it stays idle.
"""

import time
from collections.abc import Iterable

from minpro_megatron.serving.calls import PendingCalls, in_thread
from minpro_megatron.serving.control import ControlError, NoAnswerInTime, ServerControl

# A server ends its requests after their next token, and one that has just answered may hold a request for a moment.
DRAIN_S = 60.0
DRAIN_POLL_S = 0.1
ANSWER_S = 60.0  # to a request that frees nothing: a server that takes this long hangs


def start_releasing(controls: Iterable[ServerControl], drain_s: float = DRAIN_S) -> PendingCalls:
    """Starts `release_memory` for all servers, in threads."""
    controls = list(controls)
    calls = [in_thread(release_memory, control, drain_s) for control in controls]
    return PendingCalls([control.address.index for control in controls], calls)


def release_memory(control: ServerControl, drain_s: float = DRAIN_S) -> None:
    """Pauses the server, waits until it is idle, and frees its KV cache and its weights. Raises ControlError if it is
    not idle within `drain_s` seconds; it then remains paused and has released nothing."""
    control.at_most(ANSWER_S).pause_generation("abort")
    deadline = time.monotonic() + drain_s
    while True:
        try:
            control.at_most(ANSWER_S).flush_cache()
            break
        except NoAnswerInTime:
            raise
        except ControlError:  # requests are under way
            if time.monotonic() > deadline:
                raise
        time.sleep(DRAIN_POLL_S)
    control.release_memory_occupation(tags=["kv_cache", "weights"])
