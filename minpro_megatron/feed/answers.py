"""Requests of the trainer to the collector, which may first ask for weights for servers that restarted without them."""

from collections.abc import Callable

from minpro_megatron.records import PublishLease

Send = Callable[[PublishLease], None]  # sends the lease's version to the lease's servers


def answer_to[Answer](ask: Callable[[], Answer | PublishLease], send: Send) -> Answer:
    """The answer to `ask`. While a lease is returned instead, `send` fulfils it and `ask` is called again."""
    while True:
        answer = ask()
        if not isinstance(answer, PublishLease):
            return answer
        send(answer)


def release_for(ask: Callable[[], PublishLease], send: Send) -> PublishLease:
    """The lease under which the servers release their memory. Others that are returned before it are fulfilled by
    `send`."""
    while not (lease := ask()).releases:
        send(lease)
    return lease


def lease_for(version: int, ask: Callable[[], PublishLease], send: Send) -> PublishLease:
    """The lease of `version`. Leases of other versions that are returned before it are fulfilled by `send`."""
    while (lease := ask()).version != version:
        send(lease)
    return lease
