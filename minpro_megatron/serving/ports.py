"""Ports of this machine: whether a process can listen on one, and free ones."""

import errno
import random
import socket

# Free ports are searched below the range from which Linux assigns ports to outgoing connections: a port of that range
# could be taken between choosing it and listening on it, which for a rollout server is half a minute.
PORT_RANGE = range(20000, 32000)
_TRIES = 200


def listening_error(host: str, port: int) -> OSError | None:
    """The error of listening on this address; None if it is possible."""
    if port > 65535:
        return OSError("ports end at 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed port in TIME_WAIT is free
            listener.bind(address)
            listener.listen()
    except OSError as error:
        return error
    return None


def free_ports(host: str, count: int) -> list[int]:
    """`count` different ports of PORT_RANGE on which nothing listens.

    Raises OSError if `host` is not an address of this machine, or if there are not enough.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(PORT_RANGE, _TRIES):
        if len(found) == count:
            break
        error = listening_error(host, port)
        if error is None:
            found.append(port)
        elif error.errno != errno.EADDRINUSE:  # no other port has a better answer
            raise error
    if len(found) < count:
        raise OSError(
            errno.EADDRINUSE,
            f"no {count} free ports between {PORT_RANGE.start} and {PORT_RANGE.stop - 1} on {host} in {_TRIES} tries",
        )
    return found
