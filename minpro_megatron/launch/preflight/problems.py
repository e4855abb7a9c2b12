"""Why a start is refused: because of something that a person has to change, or of the present state of a machine."""

import errno

import msgspec

# What the system says of a machine, a network or a file server that does not work at the moment.
_PASSES = {
    errno.EADDRINUSE, errno.EAGAIN, errno.EBUSY, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.EIO, errno.ENETDOWN, errno.ENETUNREACH, errno.ENODEV, errno.ENOTCONN, errno.ENXIO,
    errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT,
}  # fmt: skip


class Problem(msgspec.Struct, frozen=True):
    """A line that says what is wrong. `is_transient`: it lies in the state of a machine, so another start, later or on
    other machines, may not have it; otherwise a setting, a file or the cluster has to be changed first."""

    line: str
    is_transient: bool = False

    def of(self, name: str) -> "Problem":
        """The same problem with the name of the node that has it."""
        return Problem(f"{name}: {self.line}", self.is_transient)


def passes(error: OSError) -> bool:
    """Whether the error lies in a state of the machine that may have passed at another start."""
    return error.errno in _PASSES
