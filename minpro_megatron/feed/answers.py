"""What the trainer asks of the collector, which may want weights first, for servers that have returned without them."""

from collections.abc import Callable

from minpro_megatron.records import PublishLease

Send = Callable[[PublishLease], None]  # the lease's version to the lease's servers


def answer_to[Answer](ask: Callable[[], Answer | PublishLease], send: Send) -> Answer:
    """The answer to `ask`, which is asked again after every lease that came instead was fulfilled by `send`."""
    while True:
        answer = ask()
        if not isinstance(answer, PublishLease):
            return answer
        send(answer)


def lease_for(version: int, ask: Callable[[], PublishLease], send: Send) -> PublishLease:
    """The lease of `version`; leases of other versions that come before it are fulfilled by `send`."""
    while (lease := ask()).version != version:
        send(lease)
    return lease
