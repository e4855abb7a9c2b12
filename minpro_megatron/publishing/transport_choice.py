"""Which transport a publication begins with, given what became of the earlier ones of this start of the trainer.

A fault of the path between trainer and servers, such as a firewall or a wrong network interface, leaves every server
that waits in the broadcast without an answer, so that all of them are restarted. Without a memory of it the next
publication would do the same, until the end of the run. A fault that passes should not leave the run with the slowest
transport either: where `publish.transport` has worked before, it is tried once more.
"""

from collections.abc import Sequence
from typing import NamedTuple

from minpro_megatron.publishing.sender import Transport


class Tried(NamedTuple):
    """How a transport ended in one publication: whether at least one server then had the weights."""

    transport: Transport
    arrived: bool


def first_transport(preferred: Transport, past: Sequence[Tried]) -> Transport:
    """The transport with which the next publication begins; `past` are those of this start, in order.

    >>> first_transport("broadcast", [Tried("broadcast", False)])
    'disk'
    >>> first_transport("broadcast", [Tried("broadcast", True), Tried("broadcast", False), Tried("disk", True)])
    'broadcast'
    """
    arrived = [one.arrived for one in past if one.transport == preferred]
    num_failed = arrived[::-1].index(True) if True in arrived else len(arrived)  # since it last worked
    if num_failed == 0:
        return preferred
    may_try_again = True in arrived and num_failed == 1 and past[-1].transport != preferred
    return preferred if may_try_again else "disk"
