"""Reasons to refuse a start: something that a user has to change, or the current state of a machine."""

import errno

import msgspec

# Errors of a machine, a network or a file server that temporarily does not work.
_PASSES = {
    errno.EADDRINUSE, errno.EAGAIN, errno.EBUSY, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.ENOTCONN, errno.ENXIO,
    errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip


class Problem(msgspec.Struct, frozen=True):
    """A problem in one line. `is_transient`: the state of a machine causes it, so another start, later or on other
    machines, may not have it; otherwise a setting, a file or the cluster has to be changed first."""

    line: str
    is_transient: bool = False

    def of(self, name: str) -> "Problem":
        """The same problem with the name of the node that has it."""
        return Problem(f"{name}: {self.line}", self.is_transient)


def passes(error: OSError) -> bool:
    """Whether a temporary state of the machine causes the error, so that another start may not have it."""
    return error.errno in _PASSES
